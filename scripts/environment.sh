# Sourced by quickstart.sh and test.sh: `environment FILE...` makes the packages of the requirement files importable.
# An active environment is used as it is; otherwise .venv beside the scripts is made and activated.

environment() {
    local root venv prefix file missing=() options=()
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ -z "${VIRTUAL_ENV:-}" ] && { [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-}" = base ]; }; then
        venv=$root/.venv
        [ -f "$venv/bin/activate" ] || [ -f "$venv/Scripts/activate" ] || new_environment "$venv" || return 1
        if [ -f "$venv/bin/activate" ]; then
            # shellcheck disable=SC1091
            . "$venv/bin/activate"
        else
            # shellcheck disable=SC1091
            . "$venv/Scripts/activate"  # Windows
        fi
    fi
    if ! python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Python 3.10 or newer is needed; found $(python --version 2>&1)" >&2
        return 1
    fi
    # pip takes seconds to see that all is there; a copy of each file beside the packages says it at once.
    prefix=$(python -c 'import sys; print(sys.prefix)')
    for file in "$@"; do
        if ! cmp -s "$file" "$prefix/.deeplab-$file"; then
            missing+=("$file")
            options+=(-r "$file")
        fi
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! python -c 'import pip' 2>/dev/null; then
        echo "$prefix has no pip: run \`python -m ensurepip\` in it, or leave it and start again" >&2
        return 1
    fi
    echo "installing ${missing[*]} into $prefix; pip is silent meanwhile"
    if ! python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
        echo "  torch is new there: with CUDA, as on Linux, about 3 GB to fetch and 6 GB on the disk, 5 to 20 minutes."
        echo "  For a torch without CUDA (0.3 GB) press Ctrl-C, activate that environment, install torch and torchvision"
        echo "  as pytorch.org says for the CPU, and start again."
    fi
    if ! python -m pip install --quiet --disable-pip-version-check "${options[@]}"; then
        echo "pip could not install ${missing[*]}; its reason is above. Without a network nothing can be fetched; else the" \
            "same command goes on from here" >&2
        return 1
    fi
    for file in "${missing[@]}"; do cp "$file" "$prefix/.deeplab-$file"; done
}

new_environment() {
    local python=python3
    command -v python3 >/dev/null || python=python  # Windows
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed; found $("$python" --version 2>&1 || true)" >&2
        return 1
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$python cannot make an environment (Debian and Ubuntu: apt install python3-venv); or activate one of your own" >&2
        return 1
    fi
    if ! "$python" -m venv "$1"; then
        echo "the environment $1 could not be made; the reason is above" >&2
        return 1
    fi
}
