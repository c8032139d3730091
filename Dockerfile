# For CPUs:         docker build -t sniper .
# For NVIDIA GPUs:  docker build -t sniper:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
# To run it:        docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" sniper plan train.json
#                   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" --gpus all --shm-size 8g sniper:cuda train mine.yaml
# train.compile needs a C compiler, which is not installed.
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
RUN --mount=from=build,source=/wheels,target=/wheels \
    set -- /wheels/*.whl && \
    pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint /tmp/constraints.txt "$1[tensorboard,tiff]"

# Downloaded weights and compiled kernels go below HOME, which any --user must be able to write.
ENV HOME=/tmp
RUN useradd --no-create-home sniper
USER sniper
WORKDIR /data
ENTRYPOINT ["sniper"]
