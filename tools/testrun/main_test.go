package main

import (
	"strings"
	"testing"
)

func TestPrint(t *testing.T) {
	const (
		pass = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: noise\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
`
		fail = `{"Action":"output","Package":"p","Test":"TestB","Output":"=== RUN   TestB\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:7: wrong\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"--- FAIL: TestB (0.00s)\n"}
{"Action":"fail","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`
	)
	for name, tc := range map[string]struct{ events, want string }{
		"passing tests are one line":    {pass, "ok  \tp\t0.1s\n"},
		"failing tests show output":     {fail, "    b_test.go:7: wrong\n--- FAIL: TestB (0.00s)\nFAIL\tp\t0.1s\n"},
		"what is no event goes through": {"go: no such package\n", "go: no such package\n"},
		"a test cut short is shown": {
			`{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:1: last words\n"}`,
			"    c_test.go:1: last words\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			if err := print(&b, strings.NewReader(tc.events)); err != nil {
				t.Fatal(err)
			}
			if b.String() != tc.want {
				t.Errorf("got %q, want %q", b.String(), tc.want)
			}
		})
	}
}
