#!/usr/bin/env bash
# Merge, validate, and fail the build when a bound is broken; CI reads the verdicts in out/junit.xml.
set -uo pipefail
cd "$(dirname "$0")"
rm -rf out
onnxmerge run recipe.yaml --quiet
code=$?
case $code in
  0) echo "all bounds are kept: out/merged.onnx can be deployed" ;;
  1) echo "a bound is broken: see out/junit.xml" ;;
  *) echo "the merge did not run (exit $code)" ;;
esac
exit $code
