# Sourced by the other scripts: makes .venv fit, and costs a few milliseconds when it already does.
#
# A venv fits when its stamp names this folder, this interpreter, this pyproject.toml and an extra that is large enough. The
# stamp is written last, so it never describes a half-made venv. While pip runs, the lock file says "unfinished": a run that
# finds that word was preceded by one that was killed, and starts afresh, because pip takes a half-unpacked package for an installed
# one. A venv that works but has no stamp was made by hand: it is installed into as it stands.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv="$root/.venv"
_venv_lock="$root/.venv.lock"
_venv_stamp="$venv/jaxserve-stamp"
_venv_probe='import sys, ensurepip, venv; sys.exit("older than 3.11" if sys.version_info < (3, 11) else 0)'

_venv_die() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 1
}

_venv_python() { # the interpreter to build with: $PYTHON, or the newest that can make a venv
  local name reason tried="" # candidates are run, not only found: a pyenv shim exists even where its Python does not
  for name in ${PYTHON:+"$PYTHON"} $([ -n "${PYTHON:-}" ] || echo python3.{14,13,12,11} python3 python); do
    command -v "$name" >/dev/null || { tried="$tried  $name: not found"$'\n'; continue; }
    if reason=$("$name" -c "$_venv_probe" 2>&1); then
      printf '%s\n' "$name"
      return
    fi
    tried="$tried  $name: ${reason##*$'\n'}"$'\n'
  done
  _venv_die "wanted Python 3.11 or newer with its venv module, got none:
${tried}Try: install one (Debian and Ubuntu: apt install python3.11-venv), or name one: PYTHON=/path/to/python $0"
}

_venv_version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

_venv_key() { # what the venv at hand was made from; fails when its interpreter does not run
  local version
  version=$(_venv_version "$venv/bin/python") || return 1
  printf '%s\nPython %s\n%s\n' "$root" "$version" "$(cksum <"$root/pyproject.toml")"
}

_venv_extra() { sed -n 's/^extra //p' "$_venv_stamp" 2>/dev/null || true; }

_venv_covers() { # _venv_covers HAVE WANT: each extra holds the ones before it
  case "$2:$1" in base:base | base:test | base:dev | test:test | test:dev | dev:dev) ;; *) return 1 ;; esac
}

_venv_wanted_python() { # false when $PYTHON asks for another version than the venv has
  [ -z "${PYTHON:-}" ] || [ "$(_venv_version "$PYTHON")" = "$(_venv_version "$venv/bin/python")" ]
}

_venv_fits() {
  local key
  key=$(_venv_key) && _venv_covers "$(_venv_extra)" "$1" && _venv_wanted_python &&
    [ "$(sed '/^extra /d' "$_venv_stamp")" = "$key" ]
}

_venv_usable() { # can it be installed into, or is it broken, moved here, too old, or left half-made?
  [ "$(cat "$_venv_lock")" != unfinished ] && "$venv/bin/python" -c "$_venv_probe; import pip" >/dev/null 2>&1 &&
    _venv_wanted_python && { [ ! -e "$_venv_stamp" ] || [ "$(head -n 1 "$_venv_stamp")" = "$root" ]; }
}

_venv_install() (
  cd "$root"
  extra=$1
  if _venv_covers "$(_venv_extra)" "$extra"; then extra=$(_venv_extra); fi # an update takes nothing away
  if ! _venv_usable; then
    python=$(_venv_python)
    echo "making .venv with $("$python" -V); what it needs is downloaded once, in a few minutes" >&2
    printf unfinished >"$_venv_lock"
    "$python" -m venv --clear .venv
  fi
  echo "installing jaxserve (extra: $extra) into .venv" >&2
  printf unfinished >"$_venv_lock"
  rm -f "$_venv_stamp"
  target=.
  if [ "$extra" != base ]; then target=".[$extra]"; fi
  status=0
  .venv/bin/python -m pip install --disable-pip-version-check --editable "$target" >&2 || status=$?
  if [ "$status" -lt 128 ]; then : >"$_venv_lock"; fi # pip ended by itself; what it left is whole
  [ "$status" -eq 0 ] || _venv_die "pip could not install jaxserve (its message is above)"
  { _venv_key && echo "extra $extra"; } >"$_venv_stamp.new"
  mv "$_venv_stamp.new" "$_venv_stamp"
)

ensure_venv() { # ensure_venv base|test|dev
  if _venv_fits "$1"; then return; fi
  trap 'exit 130' INT # bash would go on after a pip that handled Ctrl-C itself, and clear the mark
  exec 9>>"$_venv_lock"
  if command -v flock >/dev/null; then # macOS has none: there, two first starts at once are not kept apart
    flock -n 9 || { echo "waiting for another script that is installing into .venv" >&2; flock 9; }
  fi
  if ! _venv_fits "$1"; then _venv_install "$1" 9>&-; fi # it may fit now: another script was here meanwhile
  exec 9>&- # else the server or the tests would hold the lock for as long as they run
  trap - INT
}
