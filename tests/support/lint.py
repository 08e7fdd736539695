"""pkilint over files, in a process of its own: `lint.py FILE...` prints each finding at WARNING or above as JSON.

One process for all files, because importing pkilint takes longer than linting with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pkilint import loader, pkix
from pkilint.pkix import certificate, crl, extension, name

if TYPE_CHECKING:
    from pkilint.validation import ValidatorContainer

TROUBLE = {"WARNING", "ERROR", "FATAL"}


def certificate_linter() -> ValidatorContainer:
    decoders = certificate.create_decoding_validators(name.ATTRIBUTE_TYPE_MAPPINGS, extension.EXTENSION_MAPPINGS)
    return certificate.create_pkix_certificate_validator_container(
        decoders,
        [
            certificate.create_issuer_validator_container([]),
            certificate.create_validity_validator_container(),
            certificate.create_subject_validator_container([]),
            certificate.create_extensions_validator_container([]),
            certificate.create_spki_validator_container([]),
        ],
    )


def crl_linter() -> ValidatorContainer:
    return crl.create_pkix_crl_validator_container(
        [
            pkix.create_attribute_decoder(name.ATTRIBUTE_TYPE_MAPPINGS),
            pkix.create_extension_decoder(extension.EXTENSION_MAPPINGS),
        ],
        [
            crl.create_issuer_validator_container([]),
            crl.create_validity_validator_container([]),
            crl.create_extensions_validator_container([]),
        ],
    )


def main(paths: list[str]) -> None:
    certificates, crls = certificate_linter(), crl_linter()
    for path in paths:
        content = Path(path).read_bytes()
        if path.endswith(".crl"):
            document = loader.RFC5280CertificateListDocumentLoader().load_der_document(content, path)
            results = crls.validate(document.root)
        else:
            document = loader.RFC5280CertificateDocumentLoader().load_der_document(content, path)
            results = certificates.validate(document.root)
        for result in results:
            for found in result.finding_descriptions:
                if found.finding.severity.name in TROUBLE:
                    print(json.dumps({"file": Path(path).name, "code": found.finding.code}))
    print(json.dumps({"linted": len(paths)}))


if __name__ == "__main__":
    main(sys.argv[1:])
