package main

import (
	"fmt"
	"regexp"
	"strings"
)

// row is a feature that gantry is meant to have.
type row struct {
	id, priority, title, what string
}

// area is a titled group of rows, whose IDs begin with its code.
type area struct {
	code, title string
	rows        []row
}

type inventory struct {
	areas []area
	ids   map[string]bool
}

var (
	rowID    = regexp.MustCompile(`^([A-Z]{3})-\d{2,3}$`)
	priority = regexp.MustCompile(`^P[0-2]$`)
)

// parseInventory reads tab-separated rows, grouped by "##" lines.
func parseInventory(text string) (inventory, error) {
	inv := inventory{ids: map[string]bool{}}
	for n, line := range strings.Split(text, "\n") {
		if err := inv.add(line); err != nil {
			return inventory{}, fmt.Errorf("line %d: %w", n+1, err)
		}
	}
	return inv, nil
}

func (inv *inventory) add(line string) error {
	if head, ok := strings.CutPrefix(line, "## "); ok {
		code, title, ok := strings.Cut(head, "\t")
		if !ok {
			return fmt.Errorf("area without a title: %w", errSyntax)
		}
		inv.areas = append(inv.areas, area{code: code, title: title})
		return nil
	}
	if line == "" || strings.HasPrefix(line, "#") {
		return nil
	}
	f := strings.Split(line, "\t")
	if len(f) != 4 {
		return fmt.Errorf("%d fields, want 4: %w", len(f), errSyntax)
	}
	m := rowID.FindStringSubmatch(f[0])
	if m == nil || !priority.MatchString(f[1]) {
		return fmt.Errorf("ID %q, priority %q: %w", f[0], f[1], errSyntax)
	}
	if len(inv.areas) == 0 || inv.areas[len(inv.areas)-1].code != m[1] {
		return fmt.Errorf("%s stands outside its area: %w", f[0], errSyntax)
	}
	if inv.ids[f[0]] {
		return fmt.Errorf("%s a second time: %w", f[0], errSyntax)
	}
	inv.ids[f[0]] = true
	a := &inv.areas[len(inv.areas)-1]
	a.rows = append(a.rows, row{f[0], f[1], f[2], f[3]})
	return nil
}

// parsePartial reads what is missing from rows that work in part, by ID.
func parsePartial(text string) (map[string]string, error) {
	limits := map[string]string{}
	for n, line := range strings.Split(text, "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		id, reason, ok := strings.Cut(line, "\t")
		if !ok || strings.TrimSpace(reason) == "" || !rowID.MatchString(id) {
			return nil, fmt.Errorf("line %d: want ID, tab, what is missing: %w", n+1, errSyntax)
		}
		limits[id] = strings.TrimSpace(reason)
	}
	return limits, nil
}
