#!/usr/bin/env bash
# Builds a long-document translation set: King James Version -> World English Bible (both public domain),
# from two Debian packages that are fetched and unpacked aside, never installed. kjv_web.py does the text.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: scripts/data/kjv-web.sh [--window BYTES] OUT_DIR

Writes OUT_DIR/train.tsv, valid.tsv and test.tsv, lines of name<TAB>King James text<TAB>World English text.
Verses are joined by newlines; within a field tab, newline and backslash are written \t, \n and \\.
  (default)        one pair per chapter
  --window BYTES   consecutive verses, over chapters and books, cut at the same verses on both sides: as many as
                   keep the longer side within BYTES (2048 to 1048576, or 2K to 1M), counted as UTF-8 unescaped
  --help           this text
Chapters belong to the same split in every mode, and a window holds verses of its own split only (its name gives
the first and last verse; chapters of other splits in between are left out).
Downloaded packages are kept in OUT_DIR/cache. Exit status: 0 done, 1 failed, 2 wrongly called or a tool is missing.
EOF
}

die() { local code=$1; shift; printf 'kjv-web: %s\n' "$*" >&2; exit "$code"; }

window=0 out=
parse_window() {
  local text=$1 unit=1
  case $text in
    *[Kk]) unit=1024 text=${text%?} ;;
    *[Mm]) unit=1048576 text=${text%?} ;;
  esac
  # at most 7 digits, so that the arithmetic cannot overflow; 10# because a leading zero means octal
  if [[ $text =~ ^[0-9]{1,7}$ ]]; then window=$((10#$text * unit)); else window=0; fi
  ((window >= 2048 && window <= 1048576)) || die 2 "--window takes 2048 to 1048576 bytes (also 2K to 1M), not '$1'."
}
while [ $# -gt 0 ]; do
  case $1 in
    --help|-h) usage; exit 0 ;;
    --window) [ $# -ge 2 ] || die 2 "--window needs a number of bytes."; parse_window "$2"; shift ;;
    --window=*) parse_window "${1#*=}" ;;
    -*) die 2 "unknown option '$1' (see --help)." ;;
    *) [ -z "$out" ] || die 2 "more than one OUT_DIR: '$out' and '$1'."; out=$1
       [ -n "$out" ] || die 2 "OUT_DIR is empty." ;;
  esac
  shift
done
[ -n "$out" ] || { usage >&2; die 2 "OUT_DIR is missing."; }
for tool in mod2imp python3 dpkg-deb; do
  command -v "$tool" >/dev/null || die 2 "'$tool' is missing; run scripts/setup.sh first."
done

here=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$out/cache" || die 1 "cannot make the folder '$out/cache'."
out=$(CDPATH= cd -- "$out" && pwd)
# All is made in a private folder on the same file system, so that the last step is a mere rename.
work=$(mktemp -d "$out/.work.XXXXXX") || die 1 "cannot write in '$out'."
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

# download PACKAGE: into $work/get. As root apt would step down to user _apt, who cannot write there.
download() (
  mkdir -p "$work/get" && cd "$work/get" &&
    apt-get download -q -o APT::Sandbox::User=root "$1" >"$work/apt.log" 2>&1
)

# fetch PACKAGE: prints the path of its .deb, from the cache if a whole one lies there.
fetch() {
  local deb
  for deb in "$out/cache/$1"_*.deb; do
    if dpkg-deb --fsys-tarfile "$deb" >/dev/null 2>&1; then printf '%s\n' "$deb"; return; fi
    rm -f "$deb"
  done
  command -v apt-get >/dev/null ||
    die 1 "no apt-get here; put Debian's $1 package into '$out/cache' by hand."
  if ! download "$1"; then
    # most often apt has no package lists yet, or outdated ones
    if [ "$(id -u)" -eq 0 ]; then
      apt-get update -qq >&2 || true
      download "$1" || { cat "$work/apt.log" >&2; die 1 "apt-get could not download $1; its message is above."; }
    else
      cat "$work/apt.log" >&2
      die 1 "apt-get could not download $1; if apt has no package lists, run 'apt-get update' as root first."
    fi
  fi
  mv "$work/get/$1"_*.deb "$out/cache/" &&
    printf '%s\n' "$out/cache/$1"_*.deb
}

# export_text PACKAGE FILE: the module's raw text. mod2imp prefers a library in the current folder and also
# looks into the home folder, so it gets neither of the user's.
export_text() {
  local deb root=$work/$1 module
  deb=$(fetch "$1")
  dpkg-deb -x "$deb" "$root"
  module=$(sed -n 's/^\[\(.*\)\]$/\1/p' "$root"/usr/share/sword/mods.d/*.conf)
  (cd "$root/usr/share/sword" && HOME=$root SWORD_PATH=$PWD mod2imp "$module") >"$2" ||
    die 1 "mod2imp could not read module '$module' of $1."
}

export_text sword-text-kjv "$work/kjv.imp"
export_text sword-text-web "$work/web.imp"
mkdir "$work/new"
python3 "$here/kjv_web.py" "$work/kjv.imp" "$work/web.imp" "$work/new" "$window"
mv "$work/new"/*.tsv "$out/"
printf 'wrote train.tsv, valid.tsv and test.tsv in %s\n' "$out"
