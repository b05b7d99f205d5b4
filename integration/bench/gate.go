package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// stalledPod is the pod whose network waits at the gate.
const stalledPod = "stalled"

// stallPlugin is a CNI IPAM plugin: host-local, save that the pod named
// stalledPod waits until somebody opens the gate, a FIFO, for writing.
func stallPlugin(gate, hostLocal string) []byte {
	return fmt.Appendf(nil, `#!/bin/sh
case "$CNI_COMMAND;$CNI_ARGS;" in
ADD*";K8S_POD_NAME=%s;"*) cat '%s' >/dev/null ;;
esac
exec '%s'
`, stalledPod, gate, hostLocal)
}

func makeGate(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return fmt.Errorf("make gate: %w", err)
	}
	return nil
}

// openGate lets the plugin pass that waits, and reports whether one did.
func openGate(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENXIO) {
		return false, nil // nobody waits
	}
	if err != nil {
		return false, fmt.Errorf("open gate: %w", err)
	}
	return true, f.Close()
}
