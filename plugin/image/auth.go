package image

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxSecret bounds every credential field. Tokens of cloud registries are a
// few kilobytes.
const maxSecret = 64 << 10

// credentials is one decoded secret and the host it is for.
type credentials struct {
	// host is the one named by server_address, "" when none was.
	host string
	// user and secret as the registry client wants them: an empty user makes
	// the secret a refresh token.
	user, secret string
	// bearer is a ready access token; the others are empty then.
	bearer string
}

// decodeAuth reads an AuthConfig. The forms are tried in the order user name,
// registry token, identity token, combined; nil for no credentials.
func decodeAuth(a *cri.AuthConfig) (*credentials, error) {
	if a == nil {
		return nil, nil
	}
	for field, v := range map[string]string{
		"username": a.Username, "password": a.Password, "auth": a.Auth, "server_address": a.ServerAddress,
		"identity_token": a.IdentityToken, "registry_token": a.RegistryToken,
	} {
		if len(v) > maxSecret {
			return nil, fmt.Errorf("field auth.%s: longer than %d bytes: %w", field, maxSecret, errdefs.ErrInvalidArgument)
		}
	}
	host, err := serverHost(a.ServerAddress)
	if err != nil {
		return nil, err
	}
	c := &credentials{host: host}
	switch {
	case a.Username != "":
		c.user, c.secret = a.Username, a.Password
	case a.RegistryToken != "":
		if strings.ContainsFunc(a.RegistryToken, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
			return nil, fmt.Errorf("field auth.registry_token: not a token: %w", errdefs.ErrInvalidArgument)
		}
		c.bearer = a.RegistryToken
	case a.IdentityToken != "":
		c.secret = a.IdentityToken
	case a.Auth != "":
		if c.user, c.secret, err = decodeBasic(a.Auth); err != nil {
			return nil, err
		}
	default:
		return nil, nil
	}
	return c, nil
}

// decodeBasic takes base64 of "user:password" apart. An error never quotes it.
func decodeBasic(s string) (user, secret string, err error) {
	enc := base64.StdEncoding.Strict()
	if !strings.HasSuffix(s, "=") && len(s)%4 != 0 {
		enc = base64.RawStdEncoding.Strict()
	}
	raw, err := enc.DecodeString(s)
	if err != nil || strings.ContainsAny(s, "\r\n") {
		return "", "", fmt.Errorf("field auth.auth: not base64: %w", errdefs.ErrInvalidArgument)
	}
	// Old docker clients pad the password with zero bytes.
	user, secret, ok := strings.Cut(strings.TrimRight(string(raw), "\x00"), ":")
	if !ok || user == "" {
		return "", "", fmt.Errorf("field auth.auth: not user:password: %w", errdefs.ErrInvalidArgument)
	}
	return user, secret, nil
}

// serverHost returns the host of a server address, which may be a bare host, a
// host with a path, or a URL.
func serverHost(addr string) (string, error) {
	if addr == "" {
		return "", nil
	}
	full := addr
	if !strings.Contains(addr, "://") {
		full = "https://" + addr
	}
	u, err := url.Parse(full)
	if err != nil || u.Host == "" {
		// The error of url.Parse would quote a password in the address.
		return "", fmt.Errorf("field auth.server_address: not an address: %w", errdefs.ErrInvalidArgument)
	}
	return canonicalHost(u.Host), nil
}

// hub is the one registry with several names.
const hub = "registry-1.docker.io"

// canonicalHost gives a registry's host one spelling.
func canonicalHost(host string) string {
	host = strings.ToLower(host)
	switch host {
	case "docker.io", "index.docker.io", "registry.docker.io":
		return hub
	}
	return strings.TrimSuffix(host, ":443")
}

// digestOf identifies credentials without keeping them. Fields are written
// with their lengths, so no two configurations give the same text.
func digestOf(a *cri.AuthConfig) string {
	if a == nil {
		return ""
	}
	h := sha256.New()
	var n [8]byte
	for _, v := range []string{a.Username, a.Password, a.Auth, a.ServerAddress, a.IdentityToken, a.RegistryToken} {
		binary.BigEndian.PutUint64(n[:], uint64(len(v)))
		h.Write(n[:])
		h.Write([]byte(v))
	}
	return hex.EncodeToString(h.Sum(nil))
}
