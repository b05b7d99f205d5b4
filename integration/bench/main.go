// Command bench puts this repository's daemon beside containerd as released, in
// one run on one machine: same runc, same runc shim, same CNI configuration,
// same image, the kubelet's calls over the CRI socket. It writes what it found
// as Markdown.
//
//	make bench                                          docs/benchmarks.md
//	go run ./integration/bench -quick                   a look, on standard output
//	go run ./integration/bench -only density -rounds 9  one section, more rounds
//	go run ./integration/bench -profile /tmp/p          where the time goes instead
//
// The machine need not be quiet. Subjects take turns within a round, and who
// begins changes from round to round; a ratio is the median of the ratios of the
// rounds; CPU is what the daemon, all it started and its containers used by the
// kernel's books, so that the neighbours' work does not count.
//
// It asserts nothing and removes everything that it made. Start at sections, then
// node.go for how a daemon is set up and sample.go for how numbers are condensed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// sizes say how much is done.
type sizes struct {
	rounds   int
	pods     int // per round, one at a time
	crowd    int // per round, several at once
	traced   int // while system calls are counted
	execs    int // per round
	density  int // pods for memory and restart
	lists    int // pods for listing
	listings int // calls of each kind, per round
	restarts int
	logged   int // MiB of log, per round
}

var (
	full  = sizes{rounds: 5, pods: 10, crowd: 24, traced: 5, execs: 100, density: 50, lists: 200, listings: 1000, restarts: 5, logged: 64}
	quick = sizes{rounds: 2, pods: 4, crowd: 16, traced: 3, execs: 10, density: 10, lists: 40, listings: 50, restarts: 2, logged: 8}
)

// atOnce is how many pods come and go together where several do.
const atOnce = 8

// section is one part of the run. It owns its daemons.
type section struct {
	name    string
	measure func(context.Context, *bench) ([]table, error)
}

var sections = []section{
	{"lifecycle", lifecycle},
	{"syscalls", syscalls},
	{"density", density},
	{"listing", listing},
	{"logs", logs},
}

// options are the command line.
type options struct {
	sizes
	subjects []subject
	only     []string
	out      string
	pause    string
	profiles string
	command  string
}

func parseOptions(args []string) (options, error) {
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	o := options{sizes: full, command: "go run ./integration/bench " + strings.Join(args, " ")}
	short := f.Bool("quick", false, "a few minutes less, and less to be believed")
	density := f.Int("density", 0, "pods for memory and restart, instead of the default")
	rounds := f.Int("rounds", 0, "rounds per measurement, instead of the default")
	only := f.String("only", "", "sections to run, separated by commas: lifecycle, syscalls, density, listing, logs (all)")
	names := f.String("subjects", "stock:runc,gantry:runc,gantry:gantry", "daemon:handler pairs; the first is what the others are compared with")
	f.StringVar(&o.out, "o", "", "file for the report (standard output)")
	f.StringVar(&o.pause, "pause", "plugin/pause/bin/pause", "pause program in the stock daemon's pause image")
	f.StringVar(&o.profiles, "profile", "", "instead of measuring, write profiles, traces and debug logs of pods that come and go to this directory")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if *short {
		o.sizes = quick
	}
	if *rounds > 0 {
		o.rounds, o.restarts = *rounds, *rounds
	}
	if *density > 0 {
		o.sizes.density = *density
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, name := range o.only {
		if !slices.ContainsFunc(sections, func(s section) bool { return s.name == name }) {
			return o, fmt.Errorf("parse -only: there is no section %q", name)
		}
	}
	var err error
	o.subjects, err = parseSubjects(*names)
	return o, err
}

func main() {
	o, err := parseOptions(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil && os.Geteuid() != 0 {
		err = errors.New("it needs root, to make namespaces, mounts and cgroups")
	}
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// run measures every section that was asked for. One that fails is told in the
// report and in the end; the others are measured all the same.
func run(ctx context.Context, o options) (err error) {
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if o.profiles != "" {
		return b.profile(ctx)
	}
	r := report{options: o, host: readHost(ctx)}
	var failed []error
	for _, s := range sections {
		if len(o.only) > 0 && !slices.Contains(o.only, s.name) || ctx.Err() != nil {
			continue
		}
		began := time.Now()
		tables, err := s.measure(ctx, b)
		r.tables = append(r.tables, tables...)
		if err != nil {
			err = fmt.Errorf("measure %s: %w", s.name, err)
			failed = append(failed, err)
			r.failures = append(r.failures, s.name)
		}
		b.progress("%s: done in %.0f s", s.name, time.Since(began).Seconds())
	}
	r.versions = b.versions
	return errors.Join(append(failed, r.save(o.out))...)
}

// save writes the report to a file, or to standard output.
func (r report) save(path string) error {
	text := r.markdown()
	if path == "" {
		_, err := io.WriteString(os.Stdout, text)
		return err
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}
