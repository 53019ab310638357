// Package conformance pins the conformance program of the OCI distribution specification, which is a Go test package
// without a main: the pin needs an import, and the program is built by `go test -c`.
package conformance

import _ "github.com/opencontainers/distribution-spec/conformance"
