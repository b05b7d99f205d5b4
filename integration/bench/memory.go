package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// footprint is memory in KiB.
type footprint struct {
	daemonRSS, daemonPSS float64
	// podPSS is that of everything for the pods which is not their containers:
	// shims and pause processes, wherever they run.
	podPSS float64
}

// footprint adds up the daemon's processes. Containers run the image's busybox,
// by which they are told from the rest.
func (n *node) footprint() (footprint, error) {
	var f footprint
	pids, err := n.books.pids()
	if err != nil {
		return f, err
	}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d", pid)
		exe, err := os.Readlink(dir + "/exe")
		text, readErr := os.ReadFile(dir + "/smaps_rollup")
		if err != nil || readErr != nil {
			continue // ended meanwhile
		}
		rss, pss, err := parseRollup(text)
		if err != nil {
			return f, fmt.Errorf("read memory of %s: %w", exe, err)
		}
		switch {
		case pid == n.PID():
			f.daemonRSS, f.daemonPSS = rss, pss
		case filepath.Base(exe) != "busybox":
			f.podPSS += pss
		}
	}
	return f, nil
}

// parseRollup reads /proc/PID/smaps_rollup.
func parseRollup(text []byte) (rss, pss float64, err error) {
	for line := range bytes.Lines(text) {
		name, rest, _ := strings.Cut(string(line), ":")
		if name != "Rss" && name != "Pss" {
			continue
		}
		number, unit, _ := strings.Cut(strings.TrimSpace(rest), " ")
		if unit != "kB" {
			return 0, 0, fmt.Errorf("parse memory: %q is no number of kB", rest)
		}
		v, err := strconv.ParseFloat(number, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("parse memory: %w", err)
		}
		if name == "Rss" {
			rss = v
		} else {
			pss = v
		}
	}
	return rss, pss, nil
}

// readCommand is the command line of a process.
func readCommand(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00"), nil
}
