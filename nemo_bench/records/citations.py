"""BibTeX of the papers that more than one part of the package comes from."""

WEN = """@inproceedings{wen2024detecting,
  title = {Detecting, Explaining, and Mitigating Memorization in Diffusion Models},
  author = {Wen, Yuxin and Liu, Yuchen and Chen, Chen and Lyu, Lingjuan},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2407.21720},
  archivePrefix = {arXiv}
}"""

REN = """@inproceedings{ren2024unveiling,
  title = {Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention},
  author = {Ren, Jie and Li, Yaxin and Zeng, Shenglai and Xu, Han and Lyu, Lingjuan and Xing, Yue and Tang, Jiliang},
  booktitle = {European Conference on Computer Vision},
  year = {2024},
  eprint = {2403.11052},
  archivePrefix = {arXiv}
}"""

HINTERSDORF = """@inproceedings{hintersdorf2024nemo,
  title = {Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models},
  author = {Hintersdorf, Dominik and Struppek, Lukas and Kersting, Kristian and Dziedzic, Adam and Boenisch, Franziska},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2406.02366},
  archivePrefix = {arXiv}
}"""

CHEN = """@inproceedings{chen2025exploring,
  title = {Exploring Local Memorization in Diffusion Models via Bright Ending Attention},
  author = {Chen, Chen and Liu, Daochang and Shah, Mubarak and Xu, Chang},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  eprint = {2410.21665},
  archivePrefix = {arXiv}
}"""

JEON = """@inproceedings{jeon2025understanding,
  title = {Understanding and Mitigating Memorization in Generative Models via Sharpness of Probability Landscapes},
  author = {Jeon, Dongjae and Kim, Dueun and No, Albert},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  eprint = {2412.04140},
  archivePrefix = {arXiv}
}"""

ASTHANA = """@inproceedings{asthana2026detecting,
  title = {Detecting and Mitigating Memorization in Diffusion Models through Anisotropy of the Log-Probability},
  author = {Asthana, Rohan and Belagiannis, Vasileios},
  booktitle = {International Conference on Learning Representations},
  year = {2026},
  eprint = {2601.20642},
  archivePrefix = {arXiv}
}"""

KOWALCZUK = """@inproceedings{kowalczuk2026finding,
  title = {Finding {DoRI}: Discovery of Retained Images in Diffusion Models},
  author = {Kowalczuk, Antoni and Hintersdorf, Dominik and Struppek, Lukas and Kersting, Kristian and Dziedzic, Adam and
            Boenisch, Franziska},
  booktitle = {International Conference on Machine Learning},
  year = {2026},
  eprint = {2507.16880},
  archivePrefix = {arXiv}
}"""
