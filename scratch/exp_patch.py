import re
p="/root/exp/train.py"; s=open(p).read()
s=s.replace('''    add("--device", choices=("cpu", "cuda"), default="cpu", help="to train on")
''','''    add("--device", choices=("cpu", "cuda"), default="cpu", help="to train on")
    add("--weight-decay", type=float, default=0.0, help="of the embedding network")
    add("--emb-lr", type=float, default=1.0, help="factor of the embedding network's rate")
    add("--norm-weight", type=float, default=0.0, help="of (log norm)^2 of the embeddings")
''')
s=s.replace('''        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=options["lr"])
''','''        lr = options["lr"]
        if isinstance(self.model, TecNets) and (options["weight_decay"] or options["emb_lr"] != 1):
            e = list(self.model.embedding_net.parameters())
            groups = [dict(params=[p for p in e if p.ndim > 1], lr=lr * options["emb_lr"],
                           weight_decay=options["weight_decay"]),
                      dict(params=[p for p in e if p.ndim <= 1], lr=lr * options["emb_lr"]),
                      dict(params=list(self.model.control_net.parameters()))]
            self.optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
            self.max_lr = [group["lr"] for group in groups[:2]] + [lr]
        else:
            self.optimiser = torch.optim.Adam(self.model.parameters(), lr=lr)
            self.max_lr = lr
        self.model.norm_weight = options["norm_weight"]
''')
s=s.replace('OneCycleLR(self.optimiser, self.options["lr"], pct','OneCycleLR(self.optimiser, self.max_lr, pct')
open(p,"w").write(s)
p="/root/exp/tecnets.py"; s=open(p).read()
s=s.replace('''        s_U = self.embed(batch["frames_U"], chunk)  # (B, E)
        s_q = self.embeddings(batch["frames_q"], chunk)  # (B, Q, E)
''','''        f_U = self.embeddings(batch["frames_U"], chunk)
        s_U = sentence(f_U, c.support_mean)  # (B, E)
        s_q = f_q = self.embeddings(batch["frames_q"], chunk)  # (B, Q, E)
''')
s=s.replace('''            gathered(s_U), gathered(s_q), c.margin, c.negatives, c.hinge_mean)
        return s_U''','''            gathered(s_U), gathered(s_q), c.margin, c.negatives, c.hinge_mean)
        if getattr(self, "norm_weight", 0):
            n = torch.cat([f_U.flatten(0, 1), f_q.flatten(0, 1)]).norm(dim=-1)
            loss = loss + self.norm_weight * n.log().square().mean()
        return s_U''')
open(p,"w").write(s)
