// Command features writes docs/features.md: which rows of the feature inventory
// work.
//
//	features -inventory docs/inventory.tsv -partial docs/partial.tsv -o docs/features.md out
//	features ... -check docs/features.md out
//
// The claim comes from test runs alone. A row such as POD-07 works when the
// records under the given directory (go test -json, kept by testrun) have a test
// named TestPOD_07_Something that passed, and none of that row that failed or
// was skipped. There is no place to write "works" by hand: partial.tsv can only
// make a claim smaller. With -check nothing is written; the exit code says
// whether the committed page is what the records prove, so a page that promises
// more, or less, than the run just made fails.
//
// vm*.jsonl are the records of runs in a virtual machine. A test that is skipped
// here may pass there, and the page says so. Where that record is missing, -check
// takes the page's word for tests that were skipped here, and says how many;
// with -vm that is an error.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

func main() {
	inventory := flag.String("inventory", "docs/inventory.tsv", "rows: ID, priority, feature, what it does")
	partial := flag.String("partial", "docs/partial.tsv", "rows that work in part: ID, what is missing")
	out := flag.String("o", "", "page to write")
	check := flag.String("check", "", "page to compare with instead")
	needVM := flag.Bool("vm", false, "fail without the record of a run in a virtual machine")
	flag.Parse()
	if flag.NArg() != 1 || (*out == "") == (*check == "") {
		fmt.Fprintln(os.Stderr, "usage: features [-inventory F] [-partial F] -o PAGE | -check PAGE  RECORD-DIR")
		os.Exit(2)
	}
	if err := run(input{*inventory, *partial, flag.Arg(0), *needVM}, *out, *check); err != nil {
		fmt.Fprintln(os.Stderr, "features:", err)
		os.Exit(1)
	}
}

// input is where everything comes from.
type input struct {
	inventory, partial, records string
	needVM                      bool
}

func run(in input, out, check string) error {
	if out != "" {
		page, err := generate(in, "")
		if err != nil {
			return err
		}
		return os.WriteFile(out, page, 0o644)
	}
	have, err := os.ReadFile(check)
	if err != nil {
		return fmt.Errorf("read page: %w", err)
	}
	page, err := generate(in, string(have))
	if err != nil {
		return err
	}
	if bytes.Equal(have, page) {
		return nil
	}
	return fmt.Errorf("%s is not what the test run proves (make features writes it):\n%s", check, diff(have, page))
}

// generate makes the page. What trusted says about the virtual machine is
// believed when there is no record of it.
func generate(in input, trusted string) ([]byte, error) {
	inv, err := parseFile(in.inventory, parseInventory)
	if err != nil {
		return nil, err
	}
	limits, err := parseFile(in.partial, parsePartial)
	if err != nil {
		return nil, err
	}
	from, err := readRecords(in.records)
	if err != nil {
		return nil, err
	}
	if from.vm == nil {
		if in.needVM {
			return nil, fmt.Errorf("no %s*.jsonl in %s: run make vm-test first", vmRecord, in.records)
		}
		from.vm = claims(trusted, from.here)
		fmt.Fprintf(os.Stderr, "features: no run in a virtual machine (make vm-test); %d tests that the page says passed there were not checked\n", len(from.vm))
	}
	proofs, err := prove(inv, limits, from)
	if err != nil {
		return nil, err
	}
	return render(inv, proofs), nil
}

// vmRecord is the beginning of the names of records of tests in a virtual
// machine: vm.jsonl, and one more for each other way to boot it.
const vmRecord = "vm"

// readRecords reads all records; vm is nil when there is none of it.
func readRecords(dir string) (from places, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		return from, fmt.Errorf("find records: %w", err)
	}
	from.here = results{}
	for _, f := range files {
		if !strings.HasPrefix(filepath.Base(f), vmRecord) {
			if err := from.here.readFile(f); err != nil {
				return from, err
			}
			continue
		}
		boot := results{}
		if err := boot.readFile(f); err != nil {
			return from, err
		}
		from.vm = join(boot, from.vm)
	}
	if len(files) == 0 {
		return from, fmt.Errorf("no test records (*.jsonl) in %s: run make test first", dir)
	}
	return from, nil
}

func parseFile[T any](path string, parse func(string) (T, error)) (T, error) {
	var none T
	b, err := os.ReadFile(path)
	if err != nil {
		return none, fmt.Errorf("read: %w", err)
	}
	v, err := parse(string(b))
	if err != nil {
		return none, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

// diff lists the lines that only one of two pages has. Every line of a page
// carries its row's ID, so order adds nothing.
func diff(have, want []byte) string {
	count := map[string]int{}
	for _, l := range strings.Split(string(have), "\n") {
		count[l]++
	}
	var b strings.Builder
	for _, l := range strings.Split(string(want), "\n") {
		if count[l]--; count[l] < 0 {
			fmt.Fprintln(&b, "  proved:    ", l)
		}
	}
	for _, l := range strings.Split(string(have), "\n") {
		if count[l] > 0 {
			count[l]--
			fmt.Fprintln(&b, "  page says: ", l)
		}
	}
	return b.String()
}

var errSyntax = errors.New("bad line")
