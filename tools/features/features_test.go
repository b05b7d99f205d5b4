package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const testInventory = "## POD\tPods\nPOD-01\tP0\tname\tIdentity.\nPOD-02\tP1\thost|name\tShown inside.\n"

func event(action, test string) string {
	return `{"Action":"` + action + `","Package":"github.com/gantry-cri/gantry/integration/x","Test":"` + test + `"}` + "\n"
}

func ran(end, test string) string { return event("run", test) + event(end, test) }

// TestClaims: what a page may say for which records.
func TestClaims(t *testing.T) {
	for name, tc := range map[string]struct {
		partial string
		records []string
		want    string // in the row of POD-01, or in the error
		err     bool
	}{
		"passed":                       {"", []string{ran("pass", "TestPOD_01_Name")}, "| **works** | `integration/x.TestPOD_01_Name` |", false},
		"no test":                      {"", []string{ran("pass", "TestOther")}, "| not yet |  |", false},
		"failed":                       {"", []string{ran("fail", "TestPOD_01_Name")}, "| not yet |  |", false},
		"skipped":                      {"", []string{ran("skip", "TestPOD_01_Name")}, "| not yet |  |", false},
		"cut short":                    {"", []string{event("run", "TestPOD_01_Name")}, "| not yet |  |", false},
		"one of two failed":            {"", []string{ran("pass", "TestPOD_01_A") + ran("fail", "TestPOD_01_B")}, "| not yet |  |", false},
		"one of two skipped":           {"", []string{ran("pass", "TestPOD_01_A") + ran("skip", "TestPOD_01_B")}, "| not yet |  |", false},
		"passed, then failed":          {"", []string{ran("pass", "TestPOD_01_A") + ran("fail", "TestPOD_01_A")}, "| not yet |  |", false},
		"failed, then passed":          {"", []string{ran("fail", "TestPOD_01_A") + ran("pass", "TestPOD_01_A")}, "| not yet |  |", false},
		"failed in another record":     {"", []string{ran("pass", "TestPOD_01_A"), ran("fail", "TestPOD_01_A")}, "| not yet |  |", false},
		"a subtest alone is no proof":  {"", []string{ran("pass", "TestAll/TestPOD_01_A")}, "| not yet |  |", false},
		"two passed":                   {"", []string{ran("pass", "TestPOD_01_A") + ran("pass", "TestPOD_01_B")}, "`integration/x.TestPOD_01_A` `integration/x.TestPOD_01_B`", false},
		"partial":                      {"POD-01\tno UTF-8\n", []string{ran("pass", "TestPOD_01_A")}, "| **partial**: no UTF-8 |", false},
		"partial, one skipped":         {"POD-01\tno UTF-8\n", []string{ran("pass", "TestPOD_01_A") + ran("skip", "TestPOD_01_B")}, "| **partial**: no UTF-8 | `integration/x.TestPOD_01_A` |", false},
		"partial, all skipped":         {"POD-01\tno UTF-8\n", []string{ran("skip", "TestPOD_01_A")}, "POD-01 is listed as partial", true},
		"partial, one failed":          {"POD-01\tno UTF-8\n", []string{ran("pass", "TestPOD_01_A") + ran("fail", "TestPOD_01_B")}, "POD-01 is listed as partial", true},
		"partial without a test":       {"POD-01\tno UTF-8\n", []string{ran("pass", "TestOther")}, "POD-01 is listed as partial", true},
		"partial with a failing test":  {"POD-01\tno UTF-8\n", []string{ran("fail", "TestPOD_01_A")}, "POD-01 is listed as partial", true},
		"a test of an unknown row":     {"", []string{ran("pass", "TestPOD_77_A")}, "names row POD-77", true},
		"no records":                   {"", nil, "run make test first", true},
		"noise among the events is ok": {"", []string{"go: downloading\n" + ran("pass", "TestPOD_01_A")}, "**works**", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := write(t, tc.partial, tc.records)
			page, err := generate(inputIn(dir), "")
			got := string(page)
			if err != nil {
				got = err.Error()
			} else {
				got = got[strings.Index(got, "| POD-01"):]
			}
			if (err != nil) != tc.err || !strings.Contains(strings.SplitN(got, "\n", 2)[0], tc.want) {
				t.Errorf("got %q (err %v), want %q", got, err, tc.want)
			}
		})
	}
}

// TestCheck: a page passes only when the records prove it to the letter.
func TestCheck(t *testing.T) {
	dir := write(t, "", []string{ran("pass", "TestPOD_01_A")})
	page := filepath.Join(dir, "page")
	if err := run(inputIn(dir), page, ""); err != nil {
		t.Fatal(err)
	}
	if err := run(inputIn(dir), "", page); err != nil {
		t.Errorf("fresh page: %v", err)
	}
	put(t, filepath.Join(dir, "0.jsonl"), ran("fail", "TestPOD_01_A"))
	err := run(inputIn(dir), "", page)
	if err == nil || !strings.Contains(err.Error(), "page says:  | POD-01") || !strings.Contains(err.Error(), "proved:     | POD-01") {
		t.Errorf("page that claims too much: %v", err)
	}
}

func inputIn(dir string) input {
	return input{inventory: filepath.Join(dir, "inventory"), partial: filepath.Join(dir, "partial"), records: dir}
}

// TestSecondBoot: of two ways to boot a virtual machine each has tests that skip.
func TestSecondBoot(t *testing.T) {
	dir := write(t, "", []string{ran("skip", "TestPOD_01_A")})
	put(t, filepath.Join(dir, "vm.jsonl"), ran("pass", "TestPOD_01_A"))
	put(t, filepath.Join(dir, "vm-v1.jsonl"), ran("skip", "TestPOD_01_A"))
	for _, want := range []string{"| **works** |", "| not yet |"} {
		page := filepath.Join(dir, "page")
		if err := run(inputIn(dir), page, ""); err != nil {
			t.Fatal(err)
		}
		if text, err := os.ReadFile(page); err != nil || !strings.Contains(string(text), "| POD-01 | P0 | name | Identity. "+want) {
			t.Errorf("want %q, %v in\n%s", want, err, text)
		}
		put(t, filepath.Join(dir, "vm-v1.jsonl"), ran("fail", "TestPOD_01_A"))
	}
}

// TestVirtualMachine: what the other place adds to a row, and how far a page is
// believed when there is no record of it.
func TestVirtualMachine(t *testing.T) {
	const name = "integration/x.TestPOD_01_A"
	for what, tc := range map[string]struct{ here, vm, want string }{
		"skipped here":  {ran("skip", "TestPOD_01_A"), ran("pass", "TestPOD_01_A"), "| **works** | `" + name + "` (VM) |"},
		"skipped there": {ran("pass", "TestPOD_01_A"), ran("skip", "TestPOD_01_A"), "| **works** | `" + name + "` |"},
		"in both":       {ran("pass", "TestPOD_01_A"), ran("pass", "TestPOD_01_A"), "| **works** | `" + name + "` |"},
		"in neither":    {ran("skip", "TestPOD_01_A"), ran("skip", "TestPOD_01_A"), "| not yet |  |"},
		"failed there":  {ran("pass", "TestPOD_01_A"), ran("fail", "TestPOD_01_A"), "| not yet |  |"},
		"failed here":   {ran("fail", "TestPOD_01_A"), ran("pass", "TestPOD_01_A"), "| not yet |  |"},
		"cut short":     {ran("skip", "TestPOD_01_A"), event("run", "TestPOD_01_A"), "| not yet |  |"},
		"there alone":   {ran("pass", "TestOther"), ran("pass", "TestPOD_01_A"), "| **works** | `" + name + "` (VM) |"},
	} {
		t.Run(what, func(t *testing.T) {
			dir := write(t, "", []string{tc.here})
			put(t, filepath.Join(dir, vmRecord+".jsonl"), tc.vm)
			page := filepath.Join(dir, "page")
			if err := run(inputIn(dir), page, ""); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(text), tc.want) {
				t.Errorf("want %q in\n%s", tc.want, text)
			}
			if err := run(inputIn(dir), "", page); err != nil {
				t.Error(err)
			}
			// Without the record the page's word counts for what was skipped here.
			if err := os.Remove(filepath.Join(dir, vmRecord+".jsonl")); err != nil {
				t.Fatal(err)
			}
			believed := what != "failed there" && what != "there alone"
			if err := run(inputIn(dir), "", page); (err == nil) != believed {
				t.Errorf("without the record: %v", err)
			}
			need := inputIn(dir)
			need.needVM = true
			if err := run(need, "", page); err == nil {
				t.Error("no error where the record is needed")
			}
		})
	}
}

func TestInventoryErrors(t *testing.T) {
	for name, text := range map[string]string{
		"three fields":   "## POD\tPods\nPOD-01\tP0\tname\n",
		"outside area":   "POD-01\tP0\tname\twhat\n",
		"other area":     "## IMG\tImages\nPOD-01\tP0\tname\twhat\n",
		"twice":          testInventory + "POD-01\tP0\tname\twhat\n",
		"priority":       "## POD\tPods\nPOD-01\tP7\tname\twhat\n",
		"untitled area":  "## POD\n",
		"misspelt ID":    "## POD\tPods\nPOD01\tP0\tname\twhat\n",
		"lower-case row": "## POD\tPods\npod-01\tP0\tname\twhat\n",
	} {
		if _, err := parseInventory(text); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestCommittedInventory: the real files parse, whatever has been built.
func TestCommittedInventory(t *testing.T) {
	inv, err := parseFile("../../docs/inventory.tsv", parseInventory)
	if err != nil {
		t.Fatal(err)
	}
	if len(inv.ids) < 500 {
		t.Errorf("%d rows", len(inv.ids))
	}
	limits, err := parseFile("../../docs/partial.tsv", parsePartial)
	if err != nil {
		t.Fatal(err)
	}
	for id := range limits {
		if !inv.ids[id] {
			t.Errorf("partial.tsv names %s, which the inventory does not have", id)
		}
	}
}

func write(t *testing.T, partial string, records []string) string {
	t.Helper()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "inventory"), testInventory)
	put(t, filepath.Join(dir, "partial"), partial)
	for i, r := range records {
		put(t, filepath.Join(dir, string(rune('0'+i))+".jsonl"), r)
	}
	return dir
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
