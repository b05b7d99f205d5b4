package main

import (
	"cmp"
	"math"
	"slices"
)

// quantity is something that is measured of every subject.
type quantity struct {
	name, unit string
	// high is the quantile shown beside the median; 0 shows none.
	high float64
	// better is the most that the ratio to the first subject may be; 0 is no
	// goal.
	better float64
	// below is what the high quantile must stay under, for every subject but
	// the first; 0 is no goal.
	below float64
	// most is what the values must not exceed, for every subject but the first;
	// 0 is no goal.
	most float64
	// own are in the place of better and most for pods that our own shim runs; 0
	// leaves them.
	own goals
}

// goals are those of a quantity: see there.
type goals struct {
	better, most float64
	// crun is in the place of better where our shim has crun.
	crun float64
}

// goal returns what a subject's values are held against.
func (q quantity) goal(s subject) quantity {
	switch s.handler {
	case ownHandler:
		q.better, q.most = cmp.Or(q.own.better, q.better), cmp.Or(q.own.most, q.most)
	case crunHandler:
		q.better, q.most = cmp.Or(q.own.crun, q.own.better, q.better), cmp.Or(q.own.most, q.most)
	}
	return q
}

// measured is a quantity's values: subject, round, value.
type measured struct {
	quantity
	values map[string]map[int][]float64
}

func (m *measured) add(subject string, round int, values ...float64) {
	if m.values[subject] == nil {
		m.values[subject] = map[int][]float64{}
	}
	m.values[subject][round] = append(m.values[subject][round], values...)
}

// all are a subject's values over all rounds, sorted.
func (m *measured) all(subject string) []float64 {
	var all []float64
	for _, values := range m.values[subject] {
		all = append(all, values...)
	}
	slices.Sort(all)
	return all
}

// calmest is the high quantile of the round that has the least.
func (m *measured) calmest(subject string) float64 {
	least := math.Inf(1)
	for _, values := range m.values[subject] {
		least = min(least, quantile(slices.Sorted(slices.Values(values)), m.high))
	}
	return least
}

// ratios compares a subject with another, round by round: sorted quotients of
// medians. Rounds that one of them has not are left out, and those where there
// is nothing to divide by.
func (m *measured) ratios(subject, base string) []float64 {
	var ratios []float64
	for round, values := range m.values[subject] {
		under := median(m.values[base][round])
		if r := median(values) / under; !math.IsNaN(r) && !math.IsInf(r, 0) {
			ratios = append(ratios, r)
		}
	}
	slices.Sort(ratios)
	return ratios
}

func median(values []float64) float64 { return quantile(slices.Sorted(slices.Values(values)), 0.5) }

// quantile of sorted values, interpolated; NaN when there are none.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	at := q * float64(len(sorted)-1)
	low := int(at)
	if low+1 >= len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// sheet collects the quantities of one table in the order in which they were
// first measured.
type sheet struct {
	rows []*measured
}

// note adds values of a quantity, which its name identifies.
func (s *sheet) note(q quantity, subject string, round int, values ...float64) { //lint:house param-count: a value and its three coordinates
	i := slices.IndexFunc(s.rows, func(m *measured) bool { return m.name == q.name })
	if i < 0 {
		i = len(s.rows)
		s.rows = append(s.rows, &measured{quantity: q, values: map[string]map[int][]float64{}})
	}
	s.rows[i].add(subject, round, values...)
}

// byWeight sorts the rows, the greatest sum over all subjects first.
func (s *sheet) byWeight() {
	weight := func(m *measured) float64 {
		var sum float64
		for subject := range m.values {
			for _, v := range m.all(subject) {
				sum += v
			}
		}
		return sum
	}
	slices.SortFunc(s.rows, func(a, b *measured) int {
		return cmp.Or(cmp.Compare(weight(b), weight(a)), cmp.Compare(a.name, b.name))
	})
}
