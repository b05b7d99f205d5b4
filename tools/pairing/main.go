// Command pairing compares runs of the same tests, of which one is the reference: the
// others may not do worse.
//
//	pairing -excused integration/lifecycle/stock.tsv out/stock/runc.jsonl out/stock/gantry.jsonl
//
// A test that passed in the reference has to pass; of one that failed there, the
// complaints have to be among those of the reference, by the lines of the test that
// made them. So a test that fails in both for what has nothing to do with what is
// compared still says something. Records are those of testrun. What is excused is
// listed with the reason: the test, the records it is excused in by their names without
// .jsonl and with commas between them, and why. What is excused and would not have to be
// is a difference as well.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	excused := flag.String("excused", "", "tests that may do worse: test, records, reason, with tabs between")
	flag.Parse()
	if flag.NArg() < 2 {
		fmt.Fprintln(os.Stderr, "usage: pairing [-excused FILE] REFERENCE RECORD...")
		os.Exit(2)
	}
	same, err := run(os.Stdout, *excused, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "pairing:", err)
		os.Exit(1)
	}
	if !same {
		os.Exit(1)
	}
}

func run(w io.Writer, excused string, records []string) (same bool, err error) {
	may, err := readExcused(excused)
	if err != nil {
		return false, err
	}
	reference, err := readRecord(records[0])
	if err != nil {
		return false, err
	}
	same = true
	for _, path := range records[1:] {
		other, err := readRecord(path)
		if err != nil {
			return false, err
		}
		name := strings.TrimSuffix(filepath.Base(path), ".jsonl")
		found := compare(reference, other, may[name])
		fmt.Fprintf(w, "%s: of %d tests %d passed, as many as %d have to; %d failed as the reference did, %d are excused\n",
			name, len(reference), found.passed, found.due, found.alike, len(may[name]))
		for _, d := range found.differences {
			fmt.Fprintf(w, "%s: %s\n", name, d)
			same = false
		}
	}
	return same, nil
}

// readExcused gives the excused tests of each record.
func readExcused(path string) (map[string]map[string]bool, error) {
	may := map[string]map[string]bool{}
	if path == "" {
		return may, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read what is excused: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Split(line, "\t")
		if len(f) != 3 || f[2] == "" {
			return nil, fmt.Errorf("%s: want test, records and reason: %q", path, line)
		}
		for record := range strings.SplitSeq(f[1], ",") {
			if may[record] == nil {
				may[record] = map[string]bool{}
			}
			may[record][f[0]] = true
		}
	}
	return may, nil
}

// result is how a test ended and where it complained.
type result struct {
	action string
	lines  map[string]bool
}

// complaint is how the testing package begins what a test says.
var complaint = regexp.MustCompile(`^ +([a-z0-9_]+\.go:[0-9]+): `)

// readRecord gives how the tests of a whole run ended.
func readRecord(path string) (map[string]*result, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read record: %w", err)
	}
	defer f.Close()
	all := map[string]*result{}
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e struct{ Action, Test, Output string }
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil || e.Test == "" {
			continue // go's own message, or of the whole package
		}
		r := all[e.Test]
		if r == nil {
			r = &result{action: "cut short", lines: map[string]bool{}}
			all[e.Test] = r
		}
		switch e.Action {
		case "output":
			if strings.HasPrefix(e.Output, "panic: ") {
				return nil, fmt.Errorf("%s: the run was cut short: %s", path, e.Output)
			}
			if m := complaint.FindStringSubmatch(e.Output); m != nil {
				r.lines[m[1]] = true
			}
		case "pass", "fail", "skip":
			r.action = e.Action
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read record %s: %w", path, err)
	}
	if len(all) == 0 {
		return nil, errors.New("no tests in " + path)
	}
	return all, nil
}

// findings is what a comparison has found.
type findings struct {
	due    int // passed in the reference
	passed int
	alike  int // failed in both, with no complaint of its own
	// differences are of tests that did worse, and of excuses that are none.
	differences []string
}

func compare(reference, other map[string]*result, may map[string]bool) (f findings) {
	worse := map[string]string{}
	for test, r := range reference {
		o := other[test]
		if o == nil {
			o = &result{action: "missing"}
		}
		switch {
		case o.action == "pass":
			f.passed++
		case r.action == "pass":
			worse[test] = fmt.Sprintf("is %s at %v", o.action, slices.Sorted(maps.Keys(o.lines)))
		case r.action == "fail" && o.action == "fail":
			if own := more(o.lines, r.lines); len(own) > 0 {
				worse[test] = fmt.Sprintf("fails as in the reference and at %v", own)
				break
			}
			f.alike++
		}
		if r.action == "pass" {
			f.due++
		}
	}
	for test := range worse {
		// Of a test the part is told, not the whole that failed for it.
		for i, c := range test {
			if above := test[:i]; c == '/' && len(other[above].lines) == 0 {
				delete(worse, above)
			}
		}
	}
	for test, how := range worse {
		if !may[test] {
			f.differences = append(f.differences, test+" "+how)
		}
	}
	for test := range may {
		if reference[test] != nil && worse[test] == "" {
			f.differences = append(f.differences, test+" is excused for nothing")
		}
	}
	slices.Sort(f.differences)
	return f
}

// more are the lines that the reference has not, in order.
func more(lines, reference map[string]bool) (own []string) {
	for _, l := range slices.Sorted(maps.Keys(lines)) {
		if !reference[l] {
			own = append(own, l)
		}
	}
	return own
}
