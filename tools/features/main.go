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
	flag.Parse()
	if flag.NArg() != 1 || (*out == "") == (*check == "") {
		fmt.Fprintln(os.Stderr, "usage: features [-inventory F] [-partial F] -o PAGE | -check PAGE  RECORD-DIR")
		os.Exit(2)
	}
	if err := run(*inventory, *partial, flag.Arg(0), *out, *check); err != nil {
		fmt.Fprintln(os.Stderr, "features:", err)
		os.Exit(1)
	}
}

func run(inventory, partial, records, out, check string) error {
	page, err := generate(inventory, partial, records)
	if err != nil {
		return err
	}
	if out != "" {
		return os.WriteFile(out, page, 0o644)
	}
	have, err := os.ReadFile(check)
	if err != nil {
		return fmt.Errorf("read page: %w", err)
	}
	if bytes.Equal(have, page) {
		return nil
	}
	return fmt.Errorf("%s is not what the test run proves (make features writes it):\n%s", check, diff(have, page))
}

func generate(inventory, partial, records string) ([]byte, error) {
	inv, err := parseFile(inventory, parseInventory)
	if err != nil {
		return nil, err
	}
	limits, err := parseFile(partial, parsePartial)
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(records, "*.jsonl"))
	if err != nil {
		return nil, fmt.Errorf("find records: %w", err)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no test records (*.jsonl) in %s: run make test first", records)
	}
	res := results{}
	for _, f := range files {
		if err := res.readFile(f); err != nil {
			return nil, err
		}
	}
	proofs, err := prove(inv, limits, res)
	if err != nil {
		return nil, err
	}
	return render(inv, proofs), nil
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
