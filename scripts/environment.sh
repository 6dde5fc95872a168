# Sourced by the other scripts: `environment FILE...` installs the packages of the requirement files.
# It uses the active environment; without one it creates and activates .venv in the project folder.

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
    # pip needs seconds to find that nothing is missing; a copy of each installed file in the environment is faster to compare.
    prefix=$(python -c 'import sys; print(sys.prefix)')
    for file in "$@"; do
        if ! cmp -s "$file" "$prefix/.deeplab-$file"; then
            missing+=("$file")
            options+=(-r "$file")
        fi
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! python -c 'import pip' 2>/dev/null; then
        echo "$prefix has no pip: run \`python -m ensurepip\` in it, or deactivate it and start again" >&2
        return 1
    fi
    echo "installing ${missing[*]} into $prefix; pip prints nothing meanwhile"
    if ! python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
        echo "  torch will be installed: with CUDA (the default on Linux) a 3 GB download, 6 GB on disk, 5 to 20 minutes."
        echo "  For torch without CUDA (0.3 GB) press Ctrl-C, activate this environment, install torch and torchvision"
        echo "  for the CPU as described on pytorch.org, and start again."
    fi
    if ! python -m pip install --quiet --disable-pip-version-check "${options[@]}"; then
        echo "pip could not install ${missing[*]}; the reason is above. Check the network, then run the same" \
            "command again" >&2
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
        echo "$python cannot create an environment; install venv (Debian, Ubuntu: apt install python3-venv) or activate your own" >&2
        return 1
    fi
    if ! "$python" -m venv "$1"; then
        echo "the environment $1 could not be created; the reason is above" >&2
        return 1
    fi
}
