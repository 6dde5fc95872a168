# Sourced by quickstart.sh and test.sh: `environment FILE...` makes the packages of the requirement files importable.
# An active environment is used as it is; otherwise .venv beside the scripts is made and activated.

environment() {
    local root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ -z "${VIRTUAL_ENV:-}" ] && { [ -z "${CONDA_PREFIX:-}" ] || [ "${CONDA_DEFAULT_ENV:-}" = base ]; }; then
        if [ ! -x "$root/.venv/bin/python" ]; then
            if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
                echo "Python 3.10 or newer is needed; found $(python3 --version 2>&1)" >&2
                return 1
            fi
            python3 -m venv "$root/.venv" || return 1
        fi
        # shellcheck disable=SC1091
        . "$root/.venv/bin/activate"
    fi
    # Installing again what is there takes seconds each time; the stamp holds the requirements that are installed.
    stamp="$(python -c 'import sys; print(sys.prefix)')/.deeplab-requirements"
    if ! cat "$@" | cmp -s - "$stamp"; then
        echo "installing $* into $(dirname "$stamp")"
        local options=()
        for file in "$@"; do options+=(-r "$file"); done
        python -m pip install --quiet --disable-pip-version-check "${options[@]}" || return 1
        cat "$@" > "$stamp"
    fi
}
