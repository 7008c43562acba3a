# syntax=docker/dockerfile:1
# Image for the workers of `build_dataset --beam_pipeline_options=...` on Dataflow
# (docs/pretraining.md). In the clone:
#
#   docker build --file=launch/beam.Dockerfile --tag=IMAGE .
#
# The machine that submits needs the same versions of Python and Beam. The base image's entry point,
# /opt/apache/beam/boot, stays, because a runner starts it.
FROM apache/beam_python3.12_sdk:2.77.0

# gcsfs reaches gs:// in the workers, as it does in this project's programs.
ENV EPATH_USE_TF=false

# The packages come before the source, so that a change of the source does not install them again.
# One call, so that pip finds versions that suit both Beam and TensorFlow.
COPY requirements.txt /tmp/maeast_jax/
RUN python -m pip install --no-cache-dir -r /tmp/maeast_jax/requirements.txt \
    "apache-beam[gcp]==2.77.0" gcsfs

# pyproject.toml reads all requirement files.
COPY LICENSE README.md pyproject.toml requirements*.txt /tmp/maeast_jax/
COPY maeast_jax /tmp/maeast_jax/maeast_jax
RUN python -m pip install --no-cache-dir --no-deps /tmp/maeast_jax && rm -r /tmp/maeast_jax
