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

// places are the results of the machine that ran the tests and those of the
// virtual machine that it ran some of them in. A test that needs what only one
// of them has skips in the other.
type places struct{ here, vm results }

// merge joins both: a failure anywhere counts, a skip only if the test passed
// nowhere. onlyVM tells the tests that passed in the virtual machine alone.
func (p places) merge() (all results, onlyVM map[string]bool) {
	all, onlyVM = join(p.here, p.vm), map[string]bool{}
	for name := range p.vm {
		here, both := p.here[name]
		onlyVM[name] = all[name] == passed && (!both || here != passed)
	}
	return all, onlyVM
}

// join is what two machines say together.
func join(one, other results) results {
	all := maps.Clone(one)
	for name, there := range other {
		here, both := one[name]
		switch {
		case !both:
			all[name] = there
		case max(here, there) == skipped:
			all[name] = min(here, there)
		default:
			all[name] = max(here, there)
		}
	}
	return all
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
func prove(inv inventory, limits map[string]string, from places) (map[string]proof, error) {
	res, onlyVM := from.merge()
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
		proofs[id] = proof{state: "works", tests: marked(tests, onlyVM)}
	}
	for id, reason := range limits {
		p, ok := proofs[id]
		if !ok {
			p, ok = someProof(byRow[id], res, onlyVM)
		}
		if !ok {
			errs = append(errs, fmt.Errorf("%s is listed as partial, but no test of it passed in full", id))
			continue
		}
		p.state, p.note = "partial", reason
		proofs[id] = p
	}
	return proofs, errors.Join(errs...)
}

// someProof is that of a row which is listed as partial: a test may have been
// skipped as long as another passed and none failed.
func someProof(tests []string, res results, onlyVM map[string]bool) (proof, bool) {
	var ran []string
	for _, t := range tests {
		switch res[t] {
		case passed:
			ran = append(ran, t)
		case skipped:
		default:
			return proof{}, false
		}
	}
	return proof{tests: marked(ran, onlyVM)}, len(ran) > 0
}

// marked formats the names of tests for the page.
func marked(tests []string, onlyVM map[string]bool) []string {
	out := make([]string, len(tests))
	for i, t := range tests {
		out[i] = "`" + t + "`"
		if onlyVM[t] {
			out[i] += vmMark
		}
	}
	return out
}

// vmMark follows a test on the page that passed in the virtual machine alone.
const vmMark = " (VM)"

var vmClaim = regexp.MustCompile("`([^`]+)`" + regexp.QuoteMeta(vmMark))

// claims reads out of a page what it says was proved in the virtual machine, of
// the tests that were skipped here: those alone can be true without contradiction.
func claims(page string, here results) results {
	vm := results{}
	for _, m := range vmClaim.FindAllStringSubmatch(page, -1) {
		if o, ran := here[m[1]]; ran && o == skipped {
			vm[m[1]] = passed
		}
	}
	return vm
}
