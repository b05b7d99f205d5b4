package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestRules: each rule finds what it bans and nothing in the clean file beside.
func TestRules(t *testing.T) {
	long := "// Package p is documented.\npackage p\n\nfunc long() {\n" + strings.Repeat("\t_ = 1\n", maxLines) + "}\n"
	for rule, src := range map[string]string{
		"error-text":    head("import \"strings\"\n\nfunc f(err error) bool { return strings.Contains(err.Error(), \"x\") }"),
		"exported-doc":  head("func F() {}"),
		"func-length":   long,
		"mutex-name":    head("import \"sync\"\n\ntype t struct{ lock sync.Mutex }"),
		"no-sleep":      head("import \"time\"\n\nfunc f() { time.Sleep(1) }"),
		"no-todo":       head("// TO" + "DO: later\nfunc f() {}"),
		"package-doc":   "package p\n",
		"param-count":   head("func f(a, b, c, d, e, g int) {}"),
		"no-stub-files": head("func f() {}"),
	} {
		t.Run(rule, func(t *testing.T) {
			name := "a.go"
			if rule == "no-stub-files" {
				name = "a_other.go"
			}
			if got := names(lintSource(t, name, src)); !slices.Equal(got, []string{rule}) {
				t.Errorf("found %q", got)
			}
		})
	}
}

func TestClean(t *testing.T) {
	src := head(`import (
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

// T is documented.
type T struct {
	mu  sync.Mutex
	n   int
	poolMu sync.RWMutex
}

func (t *T) String() string { return "t" }

// F takes five parameters besides the context.
func F(ctx context.Context, a, b, c, d, e int) bool { return errors.Is(ctx.Err(), io.EOF) }

func wait() {
	time.Sleep(1) //lint:house no-sleep: a test of the linter
}`)
	if got := lintSource(t, "a.go", src); len(got) != 0 {
		t.Errorf("found %v", got)
	}
	if got := names(lintSource(t, "a.go", strings.Replace(src, ": a test of the linter", "", 1))); !slices.Equal(got, []string{"no-sleep"}) {
		t.Errorf("an excuse without a reason: found %q", got)
	}
}

// TestOtherViolations has the second form of rules that have two.
func TestOtherViolations(t *testing.T) {
	for rule, body := range map[string]string{
		"error-text":   "func f(err error) bool { return err.Error() == \"x\" }",
		"exported-doc": "type T struct{}",
		"mutex-name":   "import \"sync\"\n\ntype t struct{ sync.Mutex }",
	} {
		if got := names(lintSource(t, "a.go", head(body))); !slices.Equal(got, []string{rule}) {
			t.Errorf("%s: found %q", rule, got)
		}
	}
}

func TestRulesAreSorted(t *testing.T) {
	if !slices.IsSortedFunc(rules, func(a, b rule) int { return strings.Compare(a.name, b.name) }) {
		t.Error("the list is not in alphabetical order")
	}
}

func head(body string) string { return "// Package p is documented.\npackage p\n\n" + body + "\n" }

func lintSource(t *testing.T, name, src string) []finding {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(src), 0o644); err != nil {
		t.Fatal(err)
	}
	found, err := lint(dir)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func names(found []finding) []string {
	var names []string
	for _, f := range found {
		names = append(names, f.rule.name)
	}
	return names
}
