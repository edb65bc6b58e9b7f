# hfpipe in a container, on a CPU or on NVIDIA GPUs:
#   docker build -t hfpipe .                                      # CPU
#   docker build -t hfpipe --build-arg TORCH=cu130 .              # CUDA 13.0: a folder of download.pytorch.org/whl
#   docker run --rm -it -v "$PWD:/data" hfpipe run recipe.yaml    # with --gpus all on a machine with GPUs
# PyTorch's wheels bring the CUDA libraries along; the machine has to have the driver and nvidia-container-toolkit.
FROM python:3.11-slim

ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/data/.cache/huggingface

COPY pyproject.toml constraints.txt README.md LICENSE /src/
WORKDIR /src
# torch first and alone: a change of hfpipe does not download it again.
RUN grep -E '^torch==' constraints.txt | sed 's/+.*//' > torch.txt \
    && python -m pip install --index-url "https://download.pytorch.org/whl/${TORCH}" --requirement torch.txt
COPY hfpipe /src/hfpipe
COPY recipes /src/recipes
RUN sed 's/+cpu//' constraints.txt | grep -v '^torch==' > versions.txt \
    && python -m pip install --constraint versions.txt '.[quantization,cleaning,serving]' \
    && rm -rf /src

WORKDIR /data
ENTRYPOINT ["hfpipe"]
CMD ["--help"]
