#!/bin/sh
# Builds the anchor for GOARCH (this machine's when unset) with CC, into
# bin/anchor beside this script, from where it is embedded.
set -eu
cd "$(dirname "$0")"
arch="${GOARCH:-$(go env GOARCH)}"
host="$(go env GOHOSTARCH)"
if [ -z "${CC:-}" ]; then
	CC=cc
	if [ "$arch" != "$host" ]; then
		case "$arch" in
		amd64) CC=x86_64-linux-gnu-gcc ;;
		arm64) CC=aarch64-linux-gnu-gcc ;;
		*) echo "anchor: no compiler known for $arch; set CC" >&2; exit 1 ;;
		esac
	fi
fi
mkdir -p bin
# $CC is split on purpose: it may carry arguments.
# shellcheck disable=SC2086
$CC -Os -Wall -Wextra -Werror -std=gnu11 -static -nostdlib -nostartfiles -ffreestanding \
	-fno-stack-protector -fno-asynchronous-unwind-tables -fno-pie -no-pie -fomit-frame-pointer \
	-Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,noseparate-code -Wl,-z,max-page-size=4096 -s -o bin/anchor.new anchor.c
mv bin/anchor.new bin/anchor
