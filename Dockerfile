# dpm in a container, for the CPU by default:
#   docker build -t dpm .
#   docker run --rm -v "$PWD:/work" dpm prune model.pt --data photos --arch torchvision:resnet18 -o out
# and for CUDA, with NVIDIA's container toolkit on the host:
#   docker build -t dpm:cuda --build-arg TORCH=cuda .
#   docker run --rm --gpus all --shm-size 1g -v "$PWD:/work" dpm:cuda prune …
# Behind a package mirror, pass pip's own settings: --build-arg PIP_INDEX_URL=…
FROM python:3.12-slim

# cpu: torch's CPU builds, less than 1 GB; cuda: the usual builds, about 5 GB.
ARG TORCH=cpu
# Where pip finds torch's CPU builds; see "Get started" on pytorch.org. Unset, the usual builds are taken.
ARG TORCH_CPU_INDEX
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/dpm
COPY constraints.txt ./
# hadolint ignore=DL3013
RUN if [ "$TORCH" = cpu ] && [ -n "$TORCH_CPU_INDEX" ]; then \
        PIP_INDEX_URL="$TORCH_CPU_INDEX" pip install torch torchvision; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY dpm_cli ./dpm_cli
COPY recipes ./recipes
RUN if [ "$TORCH" = cpu ] && [ -n "$TORCH_CPU_INDEX" ]; then pip install .; else pip install -c constraints.txt .; fi \
    && dpm --version

# The host's folder of work; files there belong to whoever runs the container: --user "$(id -u):$(id -g)".
WORKDIR /work
ENV DPM_CACHE=/tmp/dpm-cache HOME=/tmp
ENTRYPOINT ["dpm"]
CMD ["--help"]
