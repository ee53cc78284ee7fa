# One environment, .venv, which `setup` makes; every other target runs in it.
PYTHON := .venv/bin/python
DROPSERVE := .venv/bin/dropserve
# Asked for its version, because a version manager's stand-in may exist and not run.
BOOTSTRAP := $(shell python3.11 -V >/dev/null 2>&1 && echo python3.11 || echo python3)

.DEFAULT_GOAL := help
.PHONY: help setup serve train test test-slow test-compose test-kserve test-openapi test-scale soak check browser screenshots docs format \
	lab-quick bench bench-accuracy bench-http bench-photos bench-capacity bench-simulation bench-bulk bench-distributed bench-report lock sbom clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile \
		| while IFS='|' read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

setup: .venv/.installed ## Make .venv and install the project and its tools, pinned

.venv/.installed: pyproject.toml constraints.txt
	test -x $(PYTHON) || $(BOOTSTRAP) -m venv .venv
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'
	touch $@

serve: train ## Serve on 127.0.0.1:8000, after training the default model if there is none
	$(DROPSERVE) serve

train: setup ## Train the default model, digits, if there is none (seconds, no download)
	$(DROPSERVE) train --dataset digits --if-missing --resume

# Two processes, for the many tests that wait for a server; one thread each, or they would compete.
test: check browser ## Run every check, and the tests that are not slow
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

# Three minutes. When the supervisor, training's files, the memory of images or bench/ have changed.
test-slow: setup ## Kill workers, trainers and disks, fill the memory, and try the benchmarks
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile -m slow

# Some minutes. When a route, a type or the OpenAPI document has changed.
test-openapi: setup ## Hold a server to its OpenAPI document with many requests, by Schemathesis
	OPENAPI_EXAMPLES=300 OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/service/http/test_openapi.py

# In an environment of its own: KServe wants another protobuf than we do. When /v2 or deploy/ has changed.
test-kserve: setup .venv-kserve/.installed ## Ask a server with KServe's own client, check KServe's manifests
	$(PYTHON) -m pytest tests/service/http/test_kserve.py tests/test_kubernetes.py

.venv-kserve/.installed: Makefile
	$(BOOTSTRAP) -m venv .venv-kserve
	.venv-kserve/bin/python -m pip install kserve==0.21.0 cloudcoil.models.prometheus-operator==0.80.1.0
	touch $@

# Where pip needs more than the Dockerfile knows: build the image `dropserve` first, and BUILD=no.
test-compose: setup ## Build the image, run docker-compose.yml by Docker or podman, and deploy/'s Pods by podman
	BUILD=$(BUILD) $(PYTHON) -m pytest tests/compose.py tests/kube_play.py -x -rs

# Bounded in time. What one machine is not enough for, with the real components: SCALE_TEST=kubernetes runs one,
# SCALE=0.1 a tenth of it, which writes no figures.
SCALE_TEST = *
test-scale: setup ## Several processes, machines and replicas, for real (ten minutes a file)
	@{ command -v haproxy && command -v bwrap; } >/dev/null \
		|| { apt-get update && apt-get install -y --no-install-recommends haproxy bubblewrap; } \
		|| echo "without haproxy and bwrap some are skipped: install them, or run this as root on Debian"
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[dev,ray]'
	@failed=0; for file in tests/scale/scale_$(SCALE_TEST).py; do \
		OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -s -rs $$file || failed=1; done; exit $$failed

# Bounded in time, over loopback only, on an idle machine: figures are measured. SOAK=overload runs one,
# SCALE=0.1 a tenth of each, which writes no figures.
SOAK = *
soak: setup ## Hold the service to its figures under load, faults and bad input (an hour and a half)
	@failed=0; for file in tests/reliability/soak_$(SOAK).py; do \
		$(PYTHON) -m pytest -q -s $$file || failed=1; done; exit $$failed

# Private names that the field's terms replaced.
WORDS := errand|express|StartingLine|NoticeBoard|pour|obey|let_go|keep_up|lay_out|streamline|brief|is_quick

check: setup ## Lint, check the format, the types and the words
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	@! grep -rnwiE '$(WORDS)' --include='*.py' --include='*.md' --include='*.js' --include='*.html' \
		README.md docs dropserve/ models service lab tests bench

browser: ## Install Debian's chromium, in which the playground is tested, if there is none
	@command -v chromium >/dev/null \
		|| { apt-get update && apt-get install -y --no-install-recommends chromium; } \
		|| { echo "chromium is needed: install it, or run 'make browser' as root on Debian"; exit 1; }

screenshots: setup browser ## Take the playground's pictures for README and docs
	@fc-list | grep -q Inter || apt-get install -y --no-install-recommends fonts-inter
	$(PYTHON) docs/screenshots.py

docs: setup ## Update the tables of docs/api.md, reliability.md and training.md, and the measured answers
	$(PYTHON) docs/generate.py

format: setup ## Format the code and fix what ruff can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Two to six minutes. When lab/, training or sampling has changed.
lab-quick: setup ## Run every experiment of the lab in its shortest form
	$(DROPSERVE) lab run all --quick --restart

# On a GPU, DEVICE=cuda: speed alone.
DEVICE = cpu
bench: setup ## Measure the engine: speed, what masks are worth, training, memory (minutes)
	$(PYTHON) -m bench.engine --device $(DEVICE)

bench-accuracy: setup ## Hold the figures of Monte Carlo dropout against plain passes and exact ones (minutes)
	$(PYTHON) -m bench.accuracy

bench-http: setup ## Load the service and its peers, each in its own environment, with wrk (an hour)
	@command -v wrk >/dev/null || { echo "wrk is needed: apt-get install wrk"; exit 1; }
	$(PYTHON) -m bench.http

# Two minutes. When something of reading bodies and images has changed, or Pillow.
bench-photos: setup ## Measure the peak memory of a worker that gets the largest images
	$(PYTHON) -m bench.photos

# Ten minutes on a quiet machine, which is not used for anything else: latencies are compared.
bench-capacity: setup ## Measure what a capacity model needs, and hold it against one and two processes
	@command -v haproxy >/dev/null || { apt-get update && apt-get install -y --no-install-recommends haproxy; }
	$(PYTHON) -m bench.capacity

# 15 minutes. On an idle machine: processor time per image, images per second.
bench-bulk: setup ## Measure bulk scoring: over HTTP, in processes, and on Ray
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[dev,ray]'
	$(PYTHON) -m bench.bulk

bench-distributed: setup ## Measure training on two processes, and in parts of a batch
	$(PYTHON) -m bench.distributed

# Two minutes. After bench-capacity.
bench-simulation: setup ## Simulate bursts, deaths, updates and autoscaling of 10 to 1,000 replicas
	$(PYTHON) -m bench.simulation

bench-report: setup ## Make docs/benchmarks.md, docs/scaling.md and their pictures from what was measured
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[bench]'
	$(PYTHON) -m bench.report
	$(PYTHON) -m bench.scaling

# After constraints.txt or the dependencies in pyproject.toml have changed. For another PyTorch, change
# torch.lock too, by hand.
lock: .venv-supply/.installed ## Renew requirements.lock: the image's packages with their hashes
	echo hatchling | .venv-supply/bin/uv pip compile pyproject.toml - --extra otel -c constraints.txt \
		--python-version 3.11 --python-platform linux --generate-hashes --no-emit-package torch \
		--no-annotate --custom-compile-command 'make lock' --quiet --output-file requirements.lock

# The tool validates what it writes. It knows one index, and PyTorch has its own.
sbom: .venv-supply/.installed ## Write build/sbom.cdx.json: the image's packages with their hashes, as CycloneDX
	mkdir -p build
	cat torch.lock requirements.lock | .venv-supply/bin/cyclonedx-py requirements - \
		--pyproject pyproject.toml --output-reproducible --output-file build/sbom.all
	sed 's|https://pypi.org/simple/torch/|https://download.pytorch.org/whl/cpu/torch/|' \
		build/sbom.all >build/sbom.cdx.json
	rm build/sbom.all

# In an environment of their own: they need two dozen packages that nothing else does.
.venv-supply/.installed: Makefile
	$(BOOTSTRAP) -m venv .venv-supply
	.venv-supply/bin/python -m pip install uv==0.13.9 cyclonedx-bom==7.5.0
	touch $@

clean: ## Remove .venv, caches and builds; checkpoints and data stay
	rm -rf .venv .venv-kserve .venv-supply bench/.venvs bench/.cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find models service lab tests bench -name __pycache__ -prune -exec rm -rf {} +
