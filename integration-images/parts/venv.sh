# venv: a Python with PyPI's packages of requirements.lock, each checked against its hash.

make_venv() {
    local work=$2 told
    # Its python3 finds itself wherever the folder is moved; the scripts beside it do not, so tests call `python3 -m`.
    python3 -m venv "$work" >&2 || fail "python3 -m venv failed (message above): install python3-venv, then run this again"
    told=$("$work/bin/python3" -m pip install --quiet --disable-pip-version-check --retries 2 --no-deps --only-binary :all: --require-hashes -r "$requirements" 2>&1) ||
        case $told in
        *"DO NOT MATCH THE HASHES"*) fail "a Python package has another checksum than $requirements has, and was not used:"$'\n'"$told" ;;
        *NewConnectionError* | *ProxyError* | *Timeout*) fail "pip cannot reach its index: check the network and the proxy, then run this again; it said:"$'\n'"$told" ;;
        *) fail "pip could not install what $requirements names; if the index no longer has it, make lock moves to the newest; it said:"$'\n'"$told" ;;
        esac
}
