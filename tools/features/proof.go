package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

const module = "github.com/gantry-cri/gantry/"

// outcome is the worst that a test did in all records.
type outcome int

const (
	passed outcome = iota
	skipped
	unfinished // it ran and no end of it was recorded
	failed
)

// results holds the outcome of every top-level test by "package.Test".
type results map[string]outcome

func (r results) readFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open record: %w", err)
	}
	defer f.Close()
	if err := r.read(f); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// read adds the outcomes of one go test -json run.
func (r results) read(events io.Reader) error {
	run := results{}
	sc := bufio.NewScanner(events)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e struct{ Action, Package, Test string }
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			continue // what go itself printed between the events
		}
		if e.Test == "" || strings.Contains(e.Test, "/") {
			continue
		}
		run.note(strings.TrimPrefix(e.Package, module)+"."+e.Test, e.Action)
	}
	for name, o := range run {
		r[name] = max(r[name], o)
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	return nil
}

// note moves a test on. Tests that run several times keep their worst end.
func (r results) note(name, action string) {
	switch action {
	case "run":
		if _, again := r[name]; !again {
			r[name] = unfinished
		}
	case "pass":
		if r[name] == unfinished {
			r[name] = passed
		}
	case "skip":
		if o, ok := r[name]; !ok || o == unfinished || o == passed {
			r[name] = skipped
		}
	case "fail":
		r[name] = failed
	}
}

// proof is what the records say about one row.
type proof struct {
	state string // "works", "partial", "not yet"
	note  string // why it is partial
	tests []string
}

var testName = regexp.MustCompile(`\.Test([A-Z]{3})_(\d{2,3})_`)

// prove assigns tests to rows. A test that names no row is an error, and so is
// a limit on a row that no test proves at all.
func prove(inv inventory, limits map[string]string, res results) (map[string]proof, error) {
	byRow := map[string][]string{}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(res)) {
		m := testName.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		id := m[1] + "-" + m[2]
		if !inv.ids[id] {
			errs = append(errs, fmt.Errorf("test %s names row %s, which the inventory does not have", name, id))
		}
		byRow[id] = append(byRow[id], name)
	}
	proofs := map[string]proof{}
	for id, tests := range byRow {
		if slices.ContainsFunc(tests, func(t string) bool { return res[t] != passed }) {
			continue
		}
		proofs[id] = proof{state: "works", tests: tests}
	}
	for id, reason := range limits {
		p, ok := proofs[id]
		if !ok {
			errs = append(errs, fmt.Errorf("%s is listed as partial, but no test of it passed in full", id))
			continue
		}
		p.state, p.note = "partial", reason
		proofs[id] = p
	}
	return proofs, errors.Join(errs...)
}
