import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dpm_cli.errors import OutputError, RunError
from dpm_cli.files import LOCK, MARKS, locked, prepare_output, write_atomic, write_text_atomic


def disk_full(path: Path) -> None:
    path.write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_written_file_replaces_the_old_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    write_atomic(path, lambda temporary: temporary.write_text("new") and None)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_whole_as_utf_8_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    write_text_atomic(path, "3 × 3")
    assert path.read_bytes() == "3 × 3".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "half \udce9")
    assert path.read_bytes() == "3 × 3".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_writer_gets_a_name_beside_the_target_with_its_suffix(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.touch()

    write_atomic(tmp_path / "model.onnx", write)
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".onnx"
    assert seen[0].name != "model.onnx"


@pytest.mark.parametrize(("write", "error"), [(disk_full, RunError), (interrupted, KeyboardInterrupt)])
def test_failure_keeps_the_old_file_and_removes_the_half_written_one(tmp_path, write, error) -> None:
    path = tmp_path / "slim.pt"
    path.write_text("old")
    with pytest.raises(error):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_names_path_and_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"slim\.pt cannot be written: No space left on device"):
        write_atomic(tmp_path / "slim.pt", disk_full)
    with pytest.raises(RunError, match="No such file or directory"):
        write_atomic(tmp_path / "absent" / "slim.pt", Path.touch)


def test_output_folder_is_made(tmp_path: Path) -> None:
    prepare_output(tmp_path / "a" / "b", overwrite=False, resume=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        prepare_output(tmp_path / "file", overwrite=False, resume=False)
    with pytest.raises(OutputError, match="Not a directory"):
        prepare_output(tmp_path / "file" / "out", overwrite=True, resume=False)
    with pytest.raises(OutputError, match="cannot be written"):
        prepare_output(tmp_path / "nul\0", overwrite=False, resume=False)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        prepare_output(tmp_path, overwrite=False, resume=False)


def test_finished_run_is_only_replaced_on_request(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(MARKS["report.json"])
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"finished run.*--overwrite"):
            prepare_output(tmp_path, overwrite=False, resume=resume)
    prepare_output(tmp_path, overwrite=True, resume=False)
    assert (tmp_path / "report.json").exists()


def test_unfinished_run_is_resumed_or_given_up(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.touch()
    with pytest.raises(OutputError, match="--resume continues it, --overwrite starts anew"):
        prepare_output(tmp_path, overwrite=False, resume=False)
    prepare_output(tmp_path, overwrite=False, resume=True)
    assert checkpoint.exists()
    prepare_output(tmp_path, overwrite=True, resume=False)
    assert checkpoint.exists()  # until the new run can begin


def test_results_without_a_report_are_not_overwritten_either(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(MARKS["recipe.yaml"])
    with pytest.raises(OutputError, match=r"already holds recipe.yaml"):
        prepare_output(tmp_path, overwrite=False, resume=False)
    prepare_output(tmp_path, overwrite=False, resume=True)  # a run that was stopped before its first checkpoint


def test_resume_and_overwrite_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="give one of them"):
        prepare_output(tmp_path, overwrite=True, resume=True)


def hold_in_another_process(folder: Path) -> "subprocess.Popen[str]":
    """A process that has locked the folder and waits."""
    code = """
        import sys
        from pathlib import Path
        from dpm_cli.files import locked
        with locked(Path(sys.argv[1])):
            print("locked", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_folder_in_use_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    process = hold_in_another_process(tmp_path)
    with pytest.raises(OutputError, match=rf"in use by process {process.pid} on .*: wait") as caught, locked(tmp_path):
        pass
    assert "\n" not in str(caught.value)
    process.communicate(timeout=20)
    ours = f"in use by process {os.getpid()} on"
    with locked(tmp_path), pytest.raises(OutputError, match=ours), locked(tmp_path / "."):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    process = hold_in_another_process(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_decoding_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, time
        from pathlib import Path
        from dpm_cli.files import locked
        works, told = os.pipe()
        with locked(Path(sys.argv[1])):
            if os.fork():
                os.read(works, 1)
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(told, b"x")
            time.sleep(5)
            os._exit(0)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=20).returncode == -signal.SIGKILL
    with locked(tmp_path):
        pass


def test_what_is_no_folder_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be locked: "), locked(tmp_path / "file"):
        pass


def test_folder_that_is_gone_at_the_end_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        shutil.rmtree(tmp_path / "out")
