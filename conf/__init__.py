"""Settings as YAML, mapped into the package as ``nemo_bench.conf``."""
