package main

import (
	"go/ast"
	"go/token"
	"path/filepath"
	"regexp"
	"strings"
)

const (
	maxLines  = 90
	maxParams = 5
)

type report func(pos token.Pos, format string, args ...any)

// rule is one house rule.
type rule struct {
	name, why string
	notTests  bool
	check     func(f file, pkg []file, r report)
}

// rules is the list, in alphabetical order.
var rules = []rule{
	{"error-text", "a text is for people and changes; match errors with errors.Is, errors.As or errdefs", true, errorText},
	{"exported-doc", "what other packages may use is documented, all of it", true, exportedDoc},
	{"func-length", "a workflow reads on one screen; a step that needs a paragraph gets a name", true, funcLength},
	{"mutex-name", "a mutex is called mu (or somethingMu), so that a reader sees what it guards below it; exported it would be everybody's", false, mutexName},
	{"no-sleep", "time is no synchronisation: wait for the event, or poll it with a ticker and a deadline", false, noSleep},
	{"no-stub-files", "Linux-only code sits in its own package; there are no files that pretend for other systems", false, noStubFiles},
	{"no-todo", "what is not done is written where users see it, not where they do not", false, noTodo},
	{"package-doc", "a package's comment says what it owns, what it never does and where to start reading", true, packageDoc},
	{"param-count", "beyond five parameters (the context aside) the reader counts commas: take a struct", true, paramCount},
}

func errorText(f file, _ []file, r report) {
	isErrorText := func(e ast.Expr) bool {
		call, ok := e.(*ast.CallExpr)
		if !ok || len(call.Args) != 0 {
			return false
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		return ok && sel.Sel.Name == "Error"
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BinaryExpr:
			if (n.Op == token.EQL || n.Op == token.NEQ) && (isErrorText(n.X) || isErrorText(n.Y)) {
				r(n.Pos(), "compares an error's text")
			}
		case *ast.CallExpr:
			sel, ok := n.Fun.(*ast.SelectorExpr)
			if !ok || len(n.Args) == 0 || !isErrorText(n.Args[0]) {
				return true
			}
			if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "strings" {
				r(n.Pos(), "looks into an error's text with strings.%s", sel.Sel.Name)
			}
		}
		return true
	})
}

func exportedDoc(f file, _ []file, r report) {
	if f.ast.Name.Name == "main" {
		return
	}
	for _, d := range f.ast.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && exportedReceiver(d) && d.Doc == nil {
				r(d.Pos(), "%s has no comment", d.Name.Name)
			}
		case *ast.GenDecl:
			// The first of an enumeration may speak for the rest.
			specs := d.Specs
			if d.Tok == token.CONST && len(specs) > 1 {
				specs = specs[:1]
			}
			for _, s := range specs {
				specDoc(d, s, r)
			}
		}
	}
}

// exportedReceiver is true for functions too.
func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	t := d.Recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
		case *ast.IndexExpr:
			t = x.X
		case *ast.IndexListExpr:
			t = x.X
		case *ast.Ident:
			// Methods that an interface of the standard library asks for speak
			// for themselves.
			return x.IsExported() && !wellKnown[d.Name.Name]
		default:
			return false
		}
	}
}

var wellKnown = map[string]bool{
	"Error": true, "Unwrap": true, "Is": true, "As": true, "String": true, "Len": true, "Less": true, "Swap": true,
	"Close": true, "Read": true, "Write": true, "MarshalJSON": true, "UnmarshalJSON": true, "MarshalText": true, "UnmarshalText": true,
}

// specDoc accepts a comment on the group, above the spec or beside it.
func specDoc(d *ast.GenDecl, s ast.Spec, r report) {
	switch s := s.(type) {
	case *ast.TypeSpec:
		if s.Name.IsExported() && d.Doc == nil && s.Doc == nil {
			r(s.Pos(), "%s has no comment", s.Name.Name)
		}
	case *ast.ValueSpec:
		if s.Names[0].IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
			r(s.Pos(), "%s has no comment", s.Names[0].Name)
		}
	}
}

func funcLength(f file, _ []file, r report) {
	for _, d := range f.ast.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Body == nil {
			continue
		}
		lines := f.fset.Position(fn.End()).Line - f.fset.Position(fn.Pos()).Line + 1
		if lines > maxLines {
			r(fn.Pos(), "%s has %d lines, more than %d", fn.Name.Name, lines, maxLines)
		}
	}
}

func mutexName(f file, _ []file, r report) {
	ast.Inspect(f.ast, func(n ast.Node) bool {
		st, ok := n.(*ast.StructType)
		if !ok {
			return true
		}
		for _, field := range st.Fields.List {
			if !isMutex(field.Type) {
				continue
			}
			if len(field.Names) == 0 {
				r(field.Pos(), "an embedded mutex exports Lock and Unlock")
			}
			for _, name := range field.Names {
				if name.Name != "mu" && !strings.HasSuffix(name.Name, "Mu") || name.IsExported() {
					r(name.Pos(), "a mutex called %s", name.Name)
				}
			}
		}
		return true
	})
}

func isMutex(t ast.Expr) bool {
	if star, ok := t.(*ast.StarExpr); ok {
		t = star.X
	}
	sel, ok := t.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && pkg.Name == "sync" && (sel.Sel.Name == "Mutex" || sel.Sel.Name == "RWMutex")
}

// noSleep lets two things pass in tests: the time of a testing/synctest bubble,
// which is no time, and the pause of a loop that polls.
func noSleep(f file, _ []file, r report) {
	for _, i := range f.ast.Imports {
		if i.Path.Value == `"testing/synctest"` {
			return
		}
	}
	var inLoop func(n ast.Node, loop bool)
	inLoop = func(root ast.Node, loop bool) {
		ast.Inspect(root, func(n ast.Node) bool {
			if n == root {
				return true
			}
			switch n.(type) {
			case *ast.ForStmt, *ast.RangeStmt:
				inLoop(n, true)
				return false
			}
			if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "Sleep" && !(loop && f.test) {
				if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "time" {
					r(sel.Pos(), "time.Sleep")
				}
			}
			return true
		})
	}
	inLoop(f.ast, false)
}

var stubFile = regexp.MustCompile(`_(other|others|unsupported|stub|windows|darwin|freebsd|nolinux)(_test)?\.go$`)

func noStubFiles(f file, _ []file, r report) {
	if stubFile.MatchString(filepath.Base(f.path)) {
		r(f.ast.Pos(), "a file for other systems")
	}
}

// todo is written so that this file does not match itself.
var todo = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X|HA` + `CK)\b`)

func noTodo(f file, _ []file, r report) {
	for _, group := range f.ast.Comments {
		for _, c := range group.List {
			if m := todo.FindString(c.Text); m != "" {
				r(c.Pos(), "%s", m)
			}
		}
	}
}

// packageDoc reports once for each package, at its first file.
func packageDoc(f file, pkg []file, r report) {
	first := true
	for _, p := range pkg {
		if p.test {
			continue
		}
		if p.ast.Doc != nil {
			return
		}
		first = first && f.path <= p.path
	}
	if first {
		r(f.ast.Name.Pos(), "package %s has no comment", f.ast.Name.Name)
	}
}

func paramCount(f file, _ []file, r report) {
	for _, d := range f.ast.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		n := 0
		for _, p := range fn.Type.Params.List {
			if !isContext(p.Type) {
				n += max(1, len(p.Names))
			}
		}
		if n > maxParams {
			r(fn.Pos(), "%s takes %d parameters", fn.Name.Name, n)
		}
	}
}

func isContext(t ast.Expr) bool {
	sel, ok := t.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && pkg.Name == "context" && sel.Sel.Name == "Context"
}
