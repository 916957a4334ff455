# Every target sets itself up in .venv, once: again only when uv.lock or pyproject.toml change.
PYTHON  ?= python3
PROFILE ?= cpu
OUT     ?= runs/course
ARGS    ?=
ROOT    ?=
TEACHER ?= lite2

READY := .venv/.ready
MCLIP := .venv/bin/python -m mclip
PYTEST := .venv/bin/python -m pytest
CHECK := runs/test-notebooks
NBVAL := $(PYTEST) --nbval-lax --nbval-current-env -p no:cacheprovider $(CHECK)/notebooks
# --inexact keeps pip and uv, which the lock file does not name; the interpreter is the one that made .venv.
SYNC  := UV_PROJECT_ENVIRONMENT=.venv UV_PYTHON=.venv/bin/python UV_PYTHON_DOWNLOADS=never .venv/bin/uv sync --locked --inexact
NEWS  := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

.PHONY: help course test lab app site photo photographs phone reproduce bench figures
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

course: $(READY) ## run the whole course; PROFILE=smoke|cpu|gpu, OUT=folder, ARGS="-p NAME VALUE --only 04 08"
	$(MCLIP) course --profile $(PROFILE) --out "$(OUT)" $(ARGS)

# nbval executes the prepared copies of the notebooks, beside the tests, since either keeps one core busy.
test: $(READY) ## run the tests, and every notebook in profile smoke against its stored outputs; ARGS='-m "not slow"'
	rm -rf $(CHECK)
	$(SYNC) --group site
	$(MCLIP) course --profile smoke --out $(CHECK) --prepare
	@export OMP_NUM_THREADS=1; \
	$(if $(findstring not slow,$(ARGS)),echo left out,$(NBVAL)) > $(CHECK)/log 2>&1 & notebooks=$$!; \
	$(PYTEST) tests $(ARGS); tests=$$?; \
	echo "the notebooks:"; wait $$notebooks; notebooks=$$?; cat $(CHECK)/log; \
	test $$tests = 0 && test $$notebooks = 0

lab: $(READY) ## open the notebooks in JupyterLab
	JUPYTER_PREFER_ENV_PATH=1 .venv/bin/python -m jupyterlab notebooks $(ARGS)

app: $(READY) ## serve the explorers as a page without code; ARGS="--port 8866"
	$(MCLIP) app $(ARGS)

site: $(READY) ## the lessons as web pages, in runs/site/html; ARGS="-E" builds all of them anew
	$(SYNC) --group site
	.venv/bin/python -m sphinx -M html notebooks runs/site --quiet --fail-on-warning $(ARGS)

photo: $(READY) ## a teacher and a student of photographs; ROOT=folder of the photographs, TEACHER=lite2|openai
	$(MCLIP) photo --root_dir "$(ROOT)" --teacher $(TEACHER) $(ARGS)

photographs: $(READY) ## train and compare base, clip and kd of three seeds on photographs, and draw the plot, in runs/study; ROOT, TEACHER as for photo
	$(MCLIP) study $(addprefix photographs/,base clip kd teacher) --anew --root_dir "$(ROOT)" --teacher $(TEACHER) $(ARGS)

phone: runs/phone/web ## show the student of photographs in a browser or on a phone; ARGS="--host ADDRESS --https"
	$(MCLIP) serve --out_dir runs/phone $(ARGS)

runs/phone/web: | $(READY)
	$(MCLIP) export --model_checkpoint photo --out_dir runs/phone --web

reproduce: $(READY) ## the long run: train and measure what data/results has no record of; ARGS="ablations --seeds 3"
	$(MCLIP) study $(ARGS)

bench: $(READY) ## measure speed and memory: one table of ratios, kept in data/results/bench.json
	$(MCLIP) bench $(ARGS)

figures: $(READY) ## redraw figures/ from the committed results
	$(MCLIP) figures $(ARGS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "The course needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one and name it, for example: make $(or $(MAKECMDGOALS),course) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(READY): pyproject.toml uv.lock | .venv/bin/python
	@.venv/bin/python -m ensurepip >/dev/null
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.10"
	$(SYNC)
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '$(NEWS)' > .venv/share/jupyter/lab/settings/overrides.json
	@touch $@
