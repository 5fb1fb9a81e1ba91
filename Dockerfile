# prefopt with the voting page, plots and quantised bases. For a processor alone:
#   docker build --tag prefopt .
# For NVIDIA GPUs, whose driver comes from the host (run with --gpus all):
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --tag prefopt:cuda .
# Files are mounted, and keep their owner:
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" prefopt dpo --model MODEL --data PAIRS.jsonl --output OUTPUT
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HOME=/tmp

# A compiler, which torch.compile and Triton call.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/prefopt
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# torch alone by that index: the builds of the others are the same for all.
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
 && pip install --constraint constraints.txt ".[collect,demo,quantise]" \
 && rm -rf /opt/prefopt/*

WORKDIR /work
ENTRYPOINT ["prefopt"]
CMD ["--help"]
