# An image that trains, from a checkout or an unpacked source distribution. EXTRAS is train,text for
# CPUs, train,text,cuda for NVIDIA GPUs and train,text,tpu for TPUs:
#   docker build --build-arg EXTRAS=train,text,tpu --build-arg COMMIT=$(git rev-parse HEAD) .
FROM python:3.12-slim
ARG EXTRAS=train,text
ARG COMMIT=
WORKDIR /vit_jax
COPY . .
# Reports and workdirs name the commit, which the image cannot ask git for.
RUN printf %s "$COMMIT" >.commit \
  && pip install --no-cache-dir --constraint constraints.txt --editable ".[$EXTRAS]"
ENTRYPOINT ["vit-jax"]
CMD ["--help"]
