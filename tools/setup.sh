#!/bin/sh
# Makes .venv with SimpleTuner, this package (editable) and the development tools, in the versions of constraints.txt.
# uv installs in seconds what takes pip minutes; where uv cannot be had, pip does it. Bytecode is compiled at once, as pip
# does: importing SimpleTuner takes minutes without it, and PYTHONDONTWRITEBYTECODE would make every process pay them.
set -eu

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}

if ! "$venv/bin/python" -c "import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))" 2>/dev/null; then
    python=$(sh tools/find_python.sh)
    echo "making $venv with $python"
    rm -rf "$venv"
    if uv --version >/dev/null 2>&1; then
        uv venv --quiet --seed --python "$python" "$venv"
    else
        "$python" -m venv "$venv"
    fi
fi

if uv --version >/dev/null 2>&1; then
    uv=uv
else
    uv="$venv/bin/uv"
    [ -x "$uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv ||
        echo "uv could not be installed; going on with pip" >&2
fi

echo "installing SimpleTuner and the development tools into $venv (several GB, minutes the first time)"
if "$uv" --version >/dev/null 2>&1; then
    "$uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --constraints "$constraints" \
        --build-constraints "$constraints" --editable ".[dev]" && exit 0
    echo "uv failed (see above); trying pip" >&2
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[dev]"
