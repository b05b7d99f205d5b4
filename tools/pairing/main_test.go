package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// ended are the events of a test that complained at lines of a_test.go.
func ended(action, test string, lines ...int) (events string) {
	for _, l := range lines {
		events += fmt.Sprintf(`{"Action":"output","Test":%q,"Output":"    a_test.go:%d: wrong\n"}`+"\n", test, l)
	}
	return events + fmt.Sprintf(`{"Action":%q,"Test":%q}`+"\n", action, test)
}

func TestRun(t *testing.T) {
	reference := ended("pass", "TestA") + ended("pass", "TestB/one") + ended("fail", "TestB", 3, 4) + ended("skip", "TestC")
	for name, tc := range map[string]struct{ other, excused, want string }{
		"the same":          {reference, "", ""},
		"better":            {strings.ReplaceAll(reference, "fail", "pass"), "", ""},
		"fewer complaints":  {ended("pass", "TestA") + ended("pass", "TestB/one") + ended("fail", "TestB", 4), "", ""},
		"more complaints":   {ended("pass", "TestA") + ended("pass", "TestB/one") + ended("fail", "TestB", 3, 5), "", "other: TestB fails as in the reference and at [a_test.go:5]\n"},
		"a part fails":      {ended("pass", "TestA") + ended("fail", "TestB/one", 2) + ended("fail", "TestB"), "", "other: TestB/one is fail at [a_test.go:2]\n"},
		"skipped":           {ended("skip", "TestA") + ended("pass", "TestB/one") + ended("fail", "TestB", 3), "", "other: TestA is skip at []\n"},
		"missing":           {ended("pass", "TestB/one") + ended("fail", "TestB", 3), "", "other: TestA is missing at []\n"},
		"excused":           {ended("pass", "TestB/one") + ended("fail", "TestB", 3), "# why\n\nTestA\tthis,other\tit cannot\n", ""},
		"excused elsewhere": {ended("pass", "TestB/one") + ended("fail", "TestB", 3), "TestA\tthis\tit cannot\n", "other: TestA is missing at []\n"},
		"needs no excuse":   {reference, "TestA\tother\tit cannot\n", "other: TestA is excused for nothing\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range map[string]string{"reference.jsonl": reference, "other.jsonl": tc.other, "excused.tsv": tc.excused} {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var b strings.Builder
			same, err := run(&b, filepath.Join(dir, "excused.tsv"), []string{filepath.Join(dir, "reference.jsonl"), filepath.Join(dir, "other.jsonl")})
			if err != nil {
				t.Fatal(err)
			}
			_, got, _ := strings.Cut(b.String(), "\n")
			if got != tc.want || same != (tc.want == "") {
				t.Errorf("got %v, %q, want %q", same, got, tc.want)
			}
		})
	}
}

func TestReadRecord(t *testing.T) {
	for name, events := range map[string]string{
		"empty":     "",
		"cut short": ended("pass", "TestA") + `{"Action":"output","Test":"TestB","Output":"panic: test timed out after 40m0s\n"}` + "\n" + ended("fail", "TestB"),
	} {
		path := filepath.Join(t.TempDir(), "x.jsonl")
		if err := os.WriteFile(path, []byte(events), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readRecord(path); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
