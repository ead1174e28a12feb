# JupyterLab on the notebooks, by the targets of the Makefile; docs/reproduce.md says how to run it.
FROM python:3.13-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home dpnb
WORKDIR /home/dpnb
COPY --chown=dpnb . .
USER dpnb
RUN make .venv/.lab .venv/.test && mkdir runs
ENV PATH=/home/dpnb/.venv/bin:$PATH
EXPOSE 8888
CMD ["make", "lab", "LAB_OPTIONS=--ip=0.0.0.0 --no-browser"]
