"""How results are shown: numbers and facts as text, charts, and the page of a run."""
