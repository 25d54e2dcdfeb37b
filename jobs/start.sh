# On the cluster: `winnow` by the interpreter of the Ray that runs this job. It may be on no PATH, for `ray` can be
# started by its full name. $1 is the process of Ray's that started us, the rest are winnow's words.
ray=$(sed -n 's|.* \(/.*\)/lib[^/]*/python3[^/]*/[^/]*-packages/ray/_raylet\.so$|\1/bin/|p' "/proc/$1/maps" 2>/dev/null | head -n 1)
shift
exec "${ray}python3" -m jobs "$@"
