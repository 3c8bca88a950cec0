# docker build -t perceiver .                                   for a CPU
# docker build -t perceiver --build-arg TORCH_BACKEND=cu130 .   for NVIDIA's GPUs; run it with --gpus all
# docker run --rm -v "$PWD:/data" perceiver train photos -o runs/photos
FROM python:3.13-slim
ARG TORCH_BACKEND=cpu
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docs/perceiver.1 docs/
COPY src src
RUN pip install --no-cache-dir uv \
 && uv pip install --system --no-cache --torch-backend ${TORCH_BACKEND} '.[video,onnx]' \
 && rm -rf /src
WORKDIR /data
ENTRYPOINT ["perceiver"]
CMD ["--help"]
