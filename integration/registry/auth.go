package registry

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// Mode is how a registry asks for credentials.
type Mode int

const (
	// Anonymous lets everybody in.
	Anonymous Mode = iota
	// Basic wants user and password with every request.
	Basic
	// Bearer wants a token, which the registry's own token server gives for
	// user and password or for the refresh token.
	Bearer
	// BearerAnonymous wants a token that everybody gets.
	BearerAnonymous
)

// Auth is a registry's access control.
type Auth struct {
	Mode           Mode
	User, Password string
	// RefreshToken is what the token server takes as refresh_token grant.
	RefreshToken string
	// Tokens are further access tokens that are accepted.
	Tokens []string
	// Realm replaces the address of the registry's own token server.
	Realm string
	// Forbidden answers 403 to those who are let in.
	Forbidden bool
	// NoPost makes the token server refuse the OAuth form.
	NoPost bool
}

const (
	tokenPath = "/token"
	// issued is the token that the token server gives.
	issued = "issued-by-the-token-server"
)

func (a Auth) withDefaults() Auth {
	if a.User == "" {
		a.User = "user"
	}
	if a.Password == "" {
		a.Password = "secret"
	}
	return a
}

// admit reports whether the request may go on; it has been answered if not.
func (a Auth) admit(base string, w http.ResponseWriter, req *http.Request) bool {
	ok := true
	switch a.Mode {
	case Basic:
		u, p, _ := req.BasicAuth()
		ok = u == a.User && p == a.Password
		if !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
		}
	case Bearer, BearerAnonymous:
		token, has := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
		ok = has && (token == issued || slices.Contains(a.Tokens, token))
		if !ok {
			realm := a.Realm
			if realm == "" {
				realm = base + tokenPath
			}
			scope := ""
			if repo := repository(req.URL.Path); repo != "" {
				scope = fmt.Sprintf(`,scope="repository:%s:pull"`, repo)
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="registry"%s`, realm, scope))
		}
	}
	switch {
	case !ok:
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	case a.Forbidden:
		refuse(w, http.StatusForbidden, "DENIED", "requested access to the resource is denied")
	default:
		return true
	}
	return false
}

// serveToken is the token server.
func (a Auth) serveToken(w http.ResponseWriter, req *http.Request) {
	ok := a.Mode == BearerAnonymous
	if req.Method == http.MethodPost {
		if a.NoPost {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		switch req.PostFormValue("grant_type") {
		case "password":
			ok = ok || req.PostFormValue("username") == a.User && req.PostFormValue("password") == a.Password
		case "refresh_token":
			ok = ok || a.RefreshToken != "" && req.PostFormValue("refresh_token") == a.RefreshToken
		}
	} else if u, p, has := req.BasicAuth(); has {
		ok = ok || u == a.User && p == a.Password
	}
	if !ok {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "wrong credentials")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": issued, "access_token": issued, "expires_in": 300})
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
}

// repository returns the repository in a request's path.
func repository(path string) string {
	path = strings.TrimPrefix(path, "/v2/")
	for _, mark := range []string{"/manifests/", "/blobs/", "/tags/"} {
		if repo, _, ok := strings.Cut(path, mark); ok {
			return repo
		}
	}
	return ""
}
