package stats

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// count is a number that the kernel may not tell.
type count struct {
	n  uint64
	ok bool
}

// known is a number that was told.
func known(n uint64) count { return count{n, true} }

// message is the count as the API has it, nil for one that was not told.
func (c count) message() *cri.UInt64Value {
	if !c.ok {
		return nil
	}
	return &cri.UInt64Value{Value: c.n}
}

// minus is c less d, zero when d is more; unknown unless both are known.
func (c count) minus(d count) count {
	if !c.ok || !d.ok {
		return count{}
	}
	return known(c.n - min(c.n, d.n))
}

// plus is the sum of what is known, at most the largest number.
func (c count) plus(d count) count {
	if c.n > math.MaxUint64-d.n {
		return known(math.MaxUint64)
	}
	return count{c.n + d.n, c.ok || d.ok}
}

// times is c in a unit f times smaller; what does not fit is unknown.
func (c count) times(f uint64) count {
	if c.n > math.MaxUint64/f {
		return count{}
	}
	return count{c.n * f, c.ok}
}

// unlimited is the least number that means no limit: version 1 of the memory
// controller writes the largest number of whole pages.
const unlimited = 1 << 62

// limit is c unless it stands for no limit.
func (c count) limit() count {
	if c.n >= unlimited {
		return count{}
	}
	return c
}

// parseNumber reads a file of one number. "max", no limit, is the largest one.
func parseNumber(b []byte) (uint64, error) {
	s := string(bytes.TrimSpace(b))
	if s == "max" {
		return math.MaxUint64, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%.32q is not a number: %w", s, errdefs.ErrInternal)
	}
	return n, nil
}

// want names a key of a file of keys, and where its number goes.
type want struct {
	key string
	to  *count
}

// parseKeys reads a file with a key and a number in each line. A key that is
// not there leaves its count unknown: kernels differ. Lines that are not wanted
// may have any form.
func parseKeys(b []byte, wants ...want) error {
	for line := range bytes.Lines(b) {
		key, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		for _, w := range wants {
			if string(key) != w.key {
				continue
			}
			n, err := parseNumber(value)
			if err != nil {
				return fmt.Errorf("%s: %w", w.key, err)
			}
			*w.to = known(n)
		}
	}
	return nil
}

// parsePressure reads a pressure file. Old kernels have no "full" line for the
// CPU; new ones have, and it may be all zero.
func parsePressure(b []byte) (*cri.PsiStats, error) {
	p := &cri.PsiStats{Some: &cri.PsiData{}, Full: &cri.PsiData{}}
	seen := false
	for line := range strings.Lines(string(b)) {
		kind, values, _ := strings.Cut(strings.TrimSpace(line), " ")
		var err error
		switch kind {
		case "some":
			seen, err = true, parsePressureLine(values, p.Some)
		case "full":
			err = parsePressureLine(values, p.Full)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kind, err)
		}
	}
	if !seen {
		return nil, fmt.Errorf("there is no line \"some\": %w", errdefs.ErrInternal)
	}
	return p, nil
}

func parsePressureLine(s string, d *cri.PsiData) (err error) {
	for field := range strings.FieldsSeq(s) {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "avg10":
			d.Avg10, err = parseAverage(value)
		case "avg60":
			d.Avg60, err = parseAverage(value)
		case "avg300":
			d.Avg300, err = parseAverage(value)
		case "total":
			var us uint64
			us, err = parseNumber([]byte(value))
			d.Total = known(us).times(1000).n
		}
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}

// parseAverage reads a part of time in per cent.
func parseAverage(s string) (float64, error) {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || !(f >= 0 && f <= 100) {
		return 0, fmt.Errorf("%.32q is not a percentage: %w", s, errdefs.ErrInternal)
	}
	return f, nil
}
