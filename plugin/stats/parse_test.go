package stats

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseNumber(t *testing.T) {
	for _, tc := range []struct {
		in  string
		out uint64
		bad bool
	}{
		{in: "0\n"},
		{in: "874668791\n", out: 874668791},
		{in: "max\n", out: math.MaxUint64},
		{in: "18446744073709551615", out: math.MaxUint64},
		{in: "18446744073709551616", bad: true},
		{in: "-1\n", bad: true},
		{in: "", bad: true},
		{in: "1 2\n", bad: true},
	} {
		n, err := parseNumber([]byte(tc.in))
		if n != tc.out || (err != nil) != tc.bad || tc.bad && !errdefs.IsInternal(err) {
			t.Errorf("%q: %d, %v", tc.in, n, err)
		}
	}
}

func TestParseKeys(t *testing.T) {
	for name, tc := range map[string]struct {
		in       string
		kill, em count
		bad      bool
	}{
		"present":            {in: "low 0\noom 1\noom_kill 3\n", kill: known(3)},
		"both":               {in: "oom_kill 3\nempty 0", kill: known(3), em: known(0)},
		"absent":             {in: "oom_kill_disable 0\nunder_oom 0\n"},
		"empty":              {},
		"others of any form": {in: "8:0 rbytes=1\n\nx\noom_kill 1\n", kill: known(1)},
		"no number":          {in: "oom_kill\n", bad: true},
		"bad number":         {in: "oom_kill -3\n", bad: true},
		"two numbers":        {in: "oom_kill 3 4\n", bad: true},
	} {
		var kill, em count
		err := parseKeys([]byte(tc.in), want{"oom_kill", &kill}, want{"empty", &em})
		if (err != nil) != tc.bad || kill != tc.kill || em != tc.em {
			t.Errorf("%s: %v %v %v", name, kill, em, err)
		}
	}
}

func TestParsePressure(t *testing.T) {
	p, err := parsePressure([]byte("some avg10=2.53 avg60=0.45 avg300=0.09 total=537881\nfull avg10=1.99 avg60=0.35 avg300=0.07 total=470894\n"))
	if err != nil {
		t.Fatal(err)
	}
	if s := p.Some; s.Avg10 != 2.53 || s.Avg60 != 0.45 || s.Avg300 != 0.09 || s.Total != 537881000 {
		t.Errorf("some: %v", s)
	}
	if f := p.Full; f.Avg10 != 1.99 || f.Avg60 != 0.35 || f.Avg300 != 0.07 || f.Total != 470894000 {
		t.Errorf("full: %v", f)
	}
	if p, err = parsePressure([]byte("some avg10=1.00 avg60=2.00 avg300=100.00 total=7\n")); err != nil || p.Some.Total != 7000 || p.Full == nil {
		t.Errorf("without full: %v, %v", p, err)
	}
	for _, s := range []string{
		"", "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", "some avg10=x", "some avg60=NaN", "some avg300=101",
		"some avg10=-1", "some total=-1", "some total=1.5",
	} {
		if p, err := parsePressure([]byte(s)); !errdefs.IsInternal(err) {
			t.Errorf("%q: %v, %v", s, p, err)
		}
	}
}

func TestCount(t *testing.T) {
	no, big := count{}, known(math.MaxUint64)
	for name, tc := range map[string]struct{ got, want count }{
		"minus":           {known(5).minus(known(3)), known(2)},
		"minus more":      {known(3).minus(known(5)), known(0)},
		"minus unknown":   {known(3).minus(no), no},
		"unknown minus":   {no.minus(known(3)), no},
		"plus":            {known(5).plus(known(3)), known(8)},
		"plus unknown":    {known(5).plus(no), known(5)},
		"unknowns":        {no.plus(no), no},
		"plus too much":   {big.plus(known(3)), big},
		"times":           {known(5).times(1000), known(5000)},
		"times too much":  {big.times(1000), no},
		"times unknown":   {no.times(1000), no},
		"limit":           {known(4096).limit(), known(4096)},
		"no limit v1":     {known(9223372036854771712).limit(), no},
		"no limit v2":     {big.limit(), no},
		"no limit at all": {no.limit(), no},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: %v, want %v", name, tc.got, tc.want)
		}
	}
	if no.message() != nil || known(0).message().GetValue() != 0 || known(7).message().GetValue() != 7 {
		t.Error("messages differ")
	}
}

func FuzzNumber(f *testing.F) {
	for _, s := range []string{"0\n", "874668791\n", "max\n", "-1", "18446744073709551616", "1e3"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parseNumber(b)
		if err != nil && (n != 0 || !errdefs.IsInternal(err) || len(err.Error()) > 256) {
			t.Fatalf("%d, %v", n, err)
		}
	})
}

func FuzzKeys(f *testing.F) {
	f.Add([]byte("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"))
	f.Add([]byte("usage_usec 887305\nuser_usec 49296\n"))
	f.Add([]byte("low 0\nhigh 0\nmax 31\noom 1\noom_kill 1\noom_group_kill 0\n"))
	f.Add([]byte("oom_kill x\n \n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var c count
		if err := parseKeys(b, want{"oom_kill", &c}); err != nil {
			if !errdefs.IsInternal(err) {
				t.Fatal(err)
			}
			return
		}
		if c.ok && !bytes.Contains(b, []byte("oom_kill ")) {
			t.Fatalf("%v in %q", c, b)
		}
	})
}

func FuzzPressure(f *testing.F) {
	f.Add("some avg10=2.53 avg60=0.45 avg300=0.09 total=537881\nfull avg10=1.99 avg60=0.35 avg300=0.07 total=470894\n")
	f.Add("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
	f.Add("some avg10=NaN total=99999999999999999999\nfull")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePressure([]byte(s))
		if err != nil {
			if p != nil || !errdefs.IsInternal(err) {
				t.Fatalf("%v, %v", p, err)
			}
			return
		}
		for _, avg := range []float64{p.Some.Avg10, p.Some.Avg60, p.Some.Avg300, p.Full.Avg10, p.Full.Avg60, p.Full.Avg300} {
			if math.IsNaN(avg) || avg < 0 || avg > 100 {
				t.Fatalf("average %v", avg)
			}
		}
		if !strings.Contains(s, "some") {
			t.Fatalf("%q is accepted", s)
		}
	})
}
