#!/usr/bin/env bash
# Installs what the tests open reports in, Debian's Chromium with its driver, where it is missing and can be installed.
# Where it cannot, it says so and goes on: the tests of the pages then fail and name the packages too.
set -euo pipefail

missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v chromedriver >/dev/null || missing+=(chromium-driver)
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "tests open the reports in a browser: install ${missing[*]} (Debian's names) as root for them to pass" >&2
  exit 0
fi

echo "installing ${missing[*]} for the tests of the reports ..."
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}" fonts-dejavu-core; } >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "${missing[*]} could not be installed; the tests of the reports will fail" >&2
fi
