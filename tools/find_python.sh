#!/bin/sh
# Prints the path of a Python that SimpleTuner can be installed with: CPython 3.12, 3.13 or 3.14, with the GIL.
# A name on PATH is not enough (version managers leave shims that do not run), so each candidate has to run and say
# what it is. 3.13 comes first, because the tests run on it.

check='
import sys, sysconfig, venv
fits = (3, 12) <= sys.version_info[:2] <= (3, 14) and sys.implementation.name == "cpython"
fits = fits and not sysconfig.get_config_var("Py_GIL_DISABLED")
fits or sys.exit(1)
print(sys.executable)
'
# Without uv the environment gets its pip from ensurepip, which Debian and Ubuntu leave out of their pythons.
uv --version >/dev/null 2>&1 || check="import ensurepip
$check"

try() {
    found=$("$1" -I -c "$check" 2>/dev/null </dev/null) && [ -x "$found" ] && echo "$found" && exit 0
}

if [ -n "$PYTHON" ]; then
    try "$PYTHON"
    echo "PYTHON=$PYTHON is not a Python 3.12 to 3.14 that runs (with ensurepip); looking for another" >&2
fi
for version in 3.13 3.12 3.14; do
    try "python$version"
    for root in "$PYENV_ROOT" "$HOME/.pyenv" "$(pyenv root 2>/dev/null)"; do
        for file in "$root/versions/$version".*/bin/python3; do
            try "$file"
        done
    done
    try "$(uv python find --no-python-downloads "$version" 2>/dev/null)"
    for folder in /opt/homebrew/bin /usr/local/bin /usr/bin; do
        try "$folder/python$version"
    done
done
try python3
try python
echo "No Python 3.12, 3.13 or 3.14 was found: install one (apt install python3.13 python3.13-venv," \
    "brew install python@3.13, pyenv install 3.13 or uv python install 3.13)" \
    "or name it: make PYTHON=/path/to/python3.13" >&2
exit 1
