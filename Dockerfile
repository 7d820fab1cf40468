# The command line in a container: docker build -t nemo-bench . && docker run -v "$PWD:/work" nemo-bench run
# On a GPU: docker run --gpus all ... nemo-bench run trainer=gpu; the torch that pip installs brings CUDA itself.
FROM python:3.12-slim
COPY . /opt/nemo_bench
RUN pip install --no-cache-dir "/opt/nemo_bench[tensorboard,parquet,fid]"
WORKDIR /work
ENTRYPOINT ["nemo-bench"]
CMD ["--help"]
