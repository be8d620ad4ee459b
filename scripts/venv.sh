# Sourced by the scripts beside it: `prepare_venv EXTRAS` makes or reuses .venv in the project's
# folder and installs the project into it, with the versions of constraints.txt.
#
# PYTHON names the interpreter to make it with; otherwise the first of python3, python3.14, … that
# is new enough. pip's own settings apply, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS among them.
# Written for bash 3.2, which macOS has.

venv_fail() {
    echo "error: $*" >&2
    exit 2
}

# Whether $1 runs and is Python 3.11 or later.
venv_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

venv_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        venv_new_enough "$PYTHON" && echo "$PYTHON" && return
        venv_fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || true); lorakit needs Python 3.11 or later."
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        venv_new_enough "$candidate" && echo "$candidate" && return
    done
    venv_fail "lorakit needs Python 3.11 or later; python3 here is $(python3 --version 2>&1 || true)." \
        "Name another with PYTHON=/path/to/python."
}

# What an installation depends on: where nothing of it changed, nothing is installed again.
venv_state() {
    cat pyproject.toml constraints.txt lorakit/__init__.py | cksum
    .venv/bin/python --version
}

prepare_venv() {
    local extras=$1 python stamp=.venv/.installed-$1
    if [ ! -e .venv ]; then
        python=$(venv_python)
        echo "· making .venv with $("$python" --version)" >&2
        "$python" -m venv .venv || {
            rm -rf .venv
            venv_fail "$python could not make a virtual environment; see its message above."
        }
    fi
    venv_new_enough .venv/bin/python ||
        venv_fail ".venv does not run Python 3.11 or later. Remove the folder and start again."
    if [ "$(cat "$stamp" 2>/dev/null)" != "$(venv_state)" ]; then
        echo "· installing lorakit[$extras] into .venv; the first time takes some minutes" >&2
        .venv/bin/python -m pip install --disable-pip-version-check \
            --editable ".[$extras]" --constraint constraints.txt
        venv_state >"$stamp"
    fi
}
