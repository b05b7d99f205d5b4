package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// table is a sheet with its heading and what a reader must know.
type table struct {
	title, remark string
	sheet
}

// report is the whole document.
type report struct {
	options  options
	host     []string
	versions map[string]string
	tables   []table
	failures []string
}

func (r report) markdown() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	base := r.options.subjects[0].name
	line("# Benchmarks")
	line("")
	line("Written by `%s`; do not edit. Package comment of `integration/bench` says how it is measured.", r.options.command)
	line("")
	for _, s := range r.options.subjects {
		line("- %s: %s", s.name, r.versions[s.name])
	}
	for _, h := range r.host {
		line("- %s", h)
	}
	line("")
	line("A cell is the median, with the named quantile behind it in brackets. The ratio to %s is the median of the ratios of paired rounds, with the least and the greatest behind it; a goal that lies between these two is undecided on a machine this busy, and so is a limit for a quantile that only some rounds kept. CPU is user and system time of the daemon, everything it started and the containers, by cgroup; *machine* is all that the machine did meanwhile, the neighbours' work included.", base)
	for _, f := range r.failures {
		line("")
		line("**Section %s did not come to its end: what it has is incomplete.**", f)
	}
	for _, t := range r.tables {
		line("")
		line("## %s", t.title)
		if t.remark != "" {
			line("")
			line("%s", t.remark)
		}
		line("")
		r.rows(line, t)
	}
	return b.String()
}

func (r report) rows(line func(string, ...any), t table) {
	base := r.options.subjects[0].name
	head, rule := "| |", "|---|"
	for i, s := range r.options.subjects {
		head += " " + s.name + " |"
		rule += "---:|"
		if i > 0 {
			head += " ratio | goal |"
			rule += "---:|---|"
		}
	}
	line("%s", head)
	line("%s", rule)
	for _, m := range t.sheet.rows {
		cells := "| " + m.title() + " |"
		for i, s := range r.options.subjects {
			cells += " " + m.cell(s.name) + " |"
			if i > 0 {
				cells += " " + ratioCell(m.ratios(s.name, base)) + " | " + m.verdict(s, base) + " |"
			}
		}
		line("%s", cells)
	}
}

func (q quantity) title() string {
	t := q.name
	if q.unit != "" {
		t += ", " + q.unit
	}
	if q.high > 0 {
		t += fmt.Sprintf(" (p%.0f)", q.high*100)
	}
	return t
}

func (m *measured) cell(subject string) string {
	all := m.all(subject)
	text := number(quantile(all, 0.5))
	if m.high > 0 && len(all) > 0 {
		text += " (" + number(quantile(all, m.high)) + ")"
	}
	return text
}

func ratioCell(ratios []float64) string {
	if len(ratios) == 0 {
		return "–"
	}
	text := fmt.Sprintf("%.2f", quantile(ratios, 0.5))
	if len(ratios) > 1 {
		text += fmt.Sprintf(" [%.2f, %.2f]", ratios[0], ratios[len(ratios)-1])
	}
	return text
}

// verdict says whether the goal is met, "" where there is none.
func (m *measured) verdict(s subject, base string) string {
	q := m.goal(s)
	var goal string
	var met, open bool
	switch {
	case q.below > 0:
		high := quantile(m.all(s.name), q.high)
		if math.IsNaN(high) {
			return ""
		}
		goal, met = fmt.Sprintf("p%.0f < %g %s", q.high*100, q.below, q.unit), high < q.below
		open = !met && m.calmest(s.name) < q.below
	case q.most > 0:
		all := m.all(s.name)
		if len(all) == 0 {
			return ""
		}
		goal, met = strings.TrimSpace(fmt.Sprintf("≤ %s %s", limit(q.most), q.unit)), all[len(all)-1] <= q.most
		open = !met && all[0] <= q.most
	case q.better > 0:
		ratios := m.ratios(s.name, base)
		if len(ratios) == 0 {
			return ""
		}
		met = quantile(ratios, 0.5) <= q.better
		open = !met && ratios[0] <= q.better
		goal = "≤ " + limit(q.better)
	default:
		return ""
	}
	switch {
	case met:
		return goal + ": met"
	case open:
		return goal + ": undecided"
	}
	return goal + ": **missed**"
}

// limit shows as many digits as a goal has, three behind the point at most.
func limit(v float64) string { return fmt.Sprintf("%g", math.Round(v*1000)/1000) }

// number shows three digits that matter.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case a >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// readHost describes the machine; what cannot be found out is left out.
func readHost(ctx context.Context) []string {
	var lines []string
	var u unix.Utsname
	var si unix.Sysinfo_t
	if unix.Uname(&u) == nil && unix.Sysinfo(&si) == nil {
		lines = append(lines, fmt.Sprintf("Linux %s, %d processors, %.0f GiB of memory",
			unix.ByteSliceToString(u.Release[:]), runtime.NumCPU(), float64(si.Totalram)*float64(si.Unit)/(1<<30)))
	}
	bins, err := daemon.BinDirs()
	if err != nil {
		return lines
	}
	for _, bin := range bins {
		runc := filepath.Join(bin, "runc")
		if !exists(runc) {
			continue
		}
		out, err := exec.CommandContext(ctx, runc, "--version").Output()
		if err == nil {
			first, _, _ := strings.Cut(string(out), "\n")
			lines = append(lines, first)
		}
		break
	}
	groups := "cgroup v2"
	if exists(cpuacctTree) {
		groups = "cgroup v1"
	}
	var fs unix.Statfs_t
	if unix.Statfs(os.TempDir(), &fs) == nil {
		lines = append(lines, fmt.Sprintf("%s, file system of type %#x, bridge CNI with host-local and portmap, without masquerading", groups, fs.Type))
	}
	return lines
}
