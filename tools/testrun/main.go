// Command testrun runs go test and keeps a record of what passed.
//
//	testrun -o out/unit.jsonl -- -race ./plugin/...
//
// It prints what go test prints without -v: a line for each package, and the
// output of each test that failed. The events that go test -json gives are
// written, as they come, to the file named by -o: the features generator reads
// which tests passed from there. The exit code is go test's own.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// event is one line of go test -json; see go doc test2json.
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
}

func main() {
	record := flag.String("o", "", "file for the go test -json events (required)")
	flag.Parse()
	if *record == "" || flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: testrun -o FILE -- GO-TEST-ARGUMENTS...")
		os.Exit(2)
	}
	code, err := run(*record, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func run(record string, args []string) (code int, err error) {
	f, err := os.Create(record)
	if err != nil {
		return 0, fmt.Errorf("create record: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()

	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, fmt.Errorf("open pipe: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start go test: %w", err)
	}
	copyErr := print(os.Stdout, io.TeeReader(out, f))
	var exit *exec.ExitError
	switch err := cmd.Wait(); {
	case errors.As(err, &exit):
		return exit.ExitCode(), copyErr
	case err != nil:
		return 0, fmt.Errorf("wait for go test: %w", err)
	}
	return 0, copyErr
}

// print turns events into the text of a plain go test run.
func print(w io.Writer, events io.Reader) error {
	held := map[string]*strings.Builder{} // output of unfinished tests
	sc := bufio.NewScanner(events)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			fmt.Fprintln(w, sc.Text()) // not an event: go's own message
			continue
		}
		show(w, held, e)
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	for _, b := range held { // a test that never ended: the process died in it
		fmt.Fprint(w, b.String())
	}
	return nil
}

func show(w io.Writer, held map[string]*strings.Builder, e event) {
	key := e.Package + "\x00" + e.Test
	switch e.Action {
	case "output", "build-output":
		if e.Test == "" {
			if e.Output != "PASS\n" {
				fmt.Fprint(w, e.Output)
			}
			return
		}
		b := held[key]
		if b == nil {
			b = &strings.Builder{}
			held[key] = b
		}
		if !strings.HasPrefix(e.Output, "=== ") {
			b.WriteString(e.Output)
		}
	case "fail":
		if b := held[key]; b != nil {
			fmt.Fprint(w, b.String())
		}
		delete(held, key)
	case "pass", "skip":
		delete(held, key)
	}
}
