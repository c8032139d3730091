# Build:   docker build -t sniper .          (torch with CUDA, which also runs on CPUs)
#          --build-arg EXTRA_INDEX_URL=URL   takes torch from another index, such as one of CPU-only builds: a tenth of the size
# Run:     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" sniper plan train.json
#          docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" --gpus all --shm-size 8g sniper train mine.yaml
# train.compile needs a C compiler, which is not installed.
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG EXTRA_INDEX_URL=
COPY constraints.txt /tmp/
RUN --mount=from=build,source=/wheels,target=/wheels \
    set -- /wheels/*.whl && \
    PIP_EXTRA_INDEX_URL="$EXTRA_INDEX_URL" pip install --no-cache-dir --constraint /tmp/constraints.txt "$1[tensorboard,tiff]"

# Downloaded weights and compiled kernels go below HOME, which any --user must be able to write.
ENV HOME=/tmp
RUN useradd --no-create-home sniper
USER sniper
WORKDIR /data
ENTRYPOINT ["sniper"]
