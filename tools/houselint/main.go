// Command houselint checks the house rules that no general linter knows; see
// rules for the list, each with its reason. It reads syntax only, so it takes a
// second.
//
//	houselint DIR
//
// A line may be excused where it stands, with a reason that a reader accepts:
//
//	time.Sleep(d) //lint:house no-sleep: the scheduler's own delay is what is measured
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: houselint DIR")
		os.Exit(2)
	}
	found, err := lint(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "houselint:", err)
		os.Exit(2)
	}
	for _, f := range found {
		fmt.Println(f)
	}
	if len(found) > 0 {
		os.Exit(1)
	}
}

// file is one parsed file.
type file struct {
	path string
	fset *token.FileSet
	ast  *ast.File
	test bool
	// excused maps a line to the rules that a comment on it excuses.
	excused map[int]string
}

// finding is one violation.
type finding struct {
	at   token.Position
	rule rule
	text string
}

func (f finding) String() string {
	return fmt.Sprintf("%s:%d: %s (%s: %s)", f.at.Filename, f.at.Line, f.text, f.rule.name, f.rule.why)
}

// lint checks every Go file below dir.
func lint(dir string) ([]finding, error) {
	packages := map[string][]file{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && path != dir {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		f, err := parse(path)
		if err == nil && !ast.IsGenerated(f.ast) {
			packages[filepath.Dir(path)] = append(packages[filepath.Dir(path)], f)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var found []finding
	for _, files := range packages {
		found = append(found, lintPackage(files)...)
	}
	slices.SortFunc(found, func(a, b finding) int {
		if c := strings.Compare(a.at.Filename, b.at.Filename); c != 0 {
			return c
		}
		return a.at.Line - b.at.Line
	})
	return found, nil
}

func parse(path string) (file, error) {
	f := file{path: path, fset: token.NewFileSet(), excused: map[int]string{}}
	// Contract suites are tests in packages of their own.
	f.test = strings.HasSuffix(path, "_test.go") || strings.HasSuffix(filepath.Dir(path), "test")
	var err error
	if f.ast, err = parser.ParseFile(f.fset, path, nil, parser.ParseComments); err != nil {
		return f, fmt.Errorf("parse: %w", err)
	}
	for _, group := range f.ast.Comments {
		for _, c := range group.List {
			if excuse, ok := strings.CutPrefix(c.Text, "//lint:house "); ok {
				name, reason, _ := strings.Cut(excuse, ":")
				if strings.TrimSpace(reason) != "" {
					f.excused[f.fset.Position(c.Pos()).Line] = name
				}
			}
		}
	}
	return f, nil
}

func lintPackage(files []file) []finding {
	var found []finding
	for _, r := range rules {
		for _, f := range files {
			if f.test && r.notTests {
				continue
			}
			r.check(f, files, func(pos token.Pos, format string, args ...any) {
				at := f.fset.Position(pos)
				if f.excused[at.Line] != r.name {
					found = append(found, finding{at, r, fmt.Sprintf(format, args...)})
				}
			})
		}
	}
	return found
}
